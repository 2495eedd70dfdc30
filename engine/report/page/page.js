"use strict";
// Draws each figure.chart from the numbers in #chart-data: axes, lines, bands, a cursor, zoom, keys.
(() => {
  const data = JSON.parse(document.getElementById("chart-data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const WIDTH = 460, HEIGHT = 230, LEFT = 52, RIGHT = 18, TOP = 10, BOTTOM = 42;

  const make = (name, attributes, parent, text) => {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  };
  const short = (x) => (x === 0 ? "0" : Math.abs(x) >= 1e5 || Math.abs(x) < 1e-3 ? (+x.toPrecision(3)).toExponential() : String(+x.toPrecision(4)));

  // Round numbers from low to high, about `count` of them.
  const ticks = (low, high, count) => {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough) ?? rough;
    const found = [];
    for (let i = Math.ceil(low / step); i * step <= high + step * 1e-9; i++) found.push(i * step);
    return found;
  };

  // The index of the point nearest to a step, by halving.
  const nearest = (steps, step) => {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle; else high = middle;
    }
    return Math.abs(steps[low] - step) <= Math.abs(steps[high] - step) ? low : high;
  };

  class Chart {
    constructor(figure, chart) {
      this.figure = figure;
      this.counts = chart.x === "step";
      this.axis = chart.x;
      this.mark = chart.mark ?? null;
      this.lines = chart.lines.map((line) => ({ ...line, plain: line.steps, shown: true }));
      this.measure();
      this.svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, tabindex: 0, role: "img", "aria-label": `${chart.title}: ${this.summary()}` }, figure);
      this.readout = document.createElement("p");
      this.readout.className = "readout";
      this.readout.setAttribute("aria-live", "polite");
      figure.append(this.readout, this.keys());
      this.listen();
      this.draw();
    }

    // Of several runs, each may take the whole width: steps as shares of the run's last one.
    measure() {
      if (this.counts) {
        this.axis = shares.on ? "% of the run" : "step";
        for (const line of this.lines) line.steps = shares.on ? line.plain.map((step) => (100 * step) / ends[line.run]) : line.plain;
      }
      const all = this.lines.flatMap((line) => [line.steps[0], line.steps[line.steps.length - 1]]);
      this.whole = [Math.min(...all), Math.max(...all)];
      if (this.whole[0] === this.whole[1]) this.whole = [this.whole[0] - 1, this.whole[1] + 1];
      this.span = [...this.whole];
      this.cursor = null;
    }

    label(line) {
      const run = data.titles.length > 1 ? `${data.titles[line.run]} ` : "";
      return `${run}${line.held_out ? "held-out " : ""}${line.name}`;
    }
    // Of several metrics in one chart, those after the first are drawn thinner.
    width(line) {
      const names = [...new Set(this.lines.map((other) => other.name))];
      return names.indexOf(line.name) ? 0.9 : 1.8;
    }
    colour(line, index) {
      return `var(--run-${(data.titles.length > 1 ? line.run : index) % 8})`;
    }
    place(line, i) { return this.counts ? `step ${Math.round(line.plain[i])}` : `${this.axis} ${short(line.steps[i])}`; }
    summary() {
      return this.lines.map((line) => `${this.label(line)} from ${short(line.values[0])} to ${short(line.values[line.values.length - 1])}`).join("; ");
    }
    keys() {
      const list = document.createElement("ul");
      list.className = "keys";
      this.lines.forEach((line, index) => {
        const button = document.createElement("button");
        button.type = "button";
        button.setAttribute("aria-pressed", "true");
        const mark = document.createElement("span");
        mark.textContent = line.held_out ? "╍ " : "━ ";
        mark.style.color = this.colour(line, index);
        button.append(mark, this.label(line));
        button.onclick = () => {
          line.shown = !line.shown;
          button.setAttribute("aria-pressed", String(line.shown));
          this.draw();
        };
        const item = document.createElement("li");
        item.append(button);
        list.append(item);
      });
      return list;
    }

    x(step) { return LEFT + ((step - this.span[0]) / (this.span[1] - this.span[0])) * (WIDTH - LEFT - RIGHT); }
    y(value) { return TOP + ((this.top - value) / (this.top - this.bottom)) * (HEIGHT - TOP - BOTTOM); }
    stepAt(event) {
      const box = this.svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * WIDTH;
      return this.span[0] + ((x - LEFT) / (WIDTH - LEFT - RIGHT)) * (this.span[1] - this.span[0]);
    }

    // The points inside the span and one on either side, so that lines reach the edges.
    range(line) {
      let first = 0, last = line.steps.length - 1;
      while (first < last && line.steps[first + 1] <= this.span[0]) first++;
      while (last > first && line.steps[last - 1] >= this.span[1]) last--;
      return [first, last];
    }

    draw() {
      this.svg.replaceChildren();
      const shown = this.lines.filter((line) => line.shown);
      let low = Infinity, high = -Infinity;
      for (const line of shown) {
        const [first, last] = this.range(line);
        for (let i = first; i <= last; i++) {
          low = Math.min(low, line.low ? line.low[i] : line.values[i]);
          high = Math.max(high, line.high ? line.high[i] : line.values[i]);
        }
      }
      if (!Number.isFinite(low)) [low, high] = [0, 1];
      if (low === high) [low, high] = [low - (Math.abs(low) / 10 || 1), high + (Math.abs(high) / 10 || 1)];
      const margin = (high - low) * 0.05;
      this.bottom = low - margin;
      this.top = high + margin;
      for (const value of ticks(this.bottom, this.top, 5)) {
        const y = this.y(value);
        make("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y }, this.svg);
        make("text", { x: LEFT - 5, y: y + 4, "text-anchor": "end" }, this.svg, short(value));
      }
      for (const step of ticks(this.span[0], this.span[1], 5)) make("text", { x: this.x(step), y: HEIGHT - BOTTOM + 15, "text-anchor": "middle" }, this.svg, short(step));
      make("text", { x: WIDTH - RIGHT, y: HEIGHT - 8, "text-anchor": "end" }, this.svg, this.axis);
      const clip = make("svg", { x: LEFT, y: 0, width: WIDTH - LEFT - RIGHT, height: HEIGHT, viewBox: `${LEFT} 0 ${WIDTH - LEFT - RIGHT} ${HEIGHT}` }, this.svg);
      this.lines.forEach((line, index) => { if (line.shown) this.drawLine(clip, line, this.colour(line, index)); });
      if (this.mark !== null && this.mark >= this.span[0] && this.mark <= this.span[1]) {
        const x = this.x(this.mark);
        make("line", { class: "mark", x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM }, this.svg);
        make("text", { x: x - 4, y: TOP + 9, "text-anchor": "end" }, this.svg, "turns here");
      }
      this.overlay = make("g", {}, this.svg);
      this.drawCursor();
    }

    drawLine(parent, line, colour) {
      const [first, last] = this.range(line);
      const points = [], upper = [], lower = [];
      for (let i = first; i <= last; i++) {
        const x = this.x(line.steps[i]).toFixed(1);
        points.push(`${x},${this.y(line.values[i]).toFixed(1)}`);
        if (line.low) {
          upper.push(`${x},${this.y(line.high[i]).toFixed(1)}`);
          lower.unshift(`${x},${this.y(line.low[i]).toFixed(1)}`);
        }
      }
      if (line.low) make("polygon", { class: "band", points: [...upper, ...lower].join(" "), style: `fill:${colour}` }, parent);
      make("polyline", { class: line.held_out ? "curve held" : "curve", points: points.join(" "), style: `stroke:${colour};stroke-width:${this.width(line)}` }, parent);
      if (last - first < 60) for (const point of points) {
        const [cx, cy] = point.split(",");
        make("circle", { cx, cy, r: line.held_out ? 2.6 : 1.6, style: `fill:${colour}` }, parent);
      }
    }

    drawCursor() {
      this.overlay.replaceChildren();
      if (this.drag) {
        const [a, b] = [this.x(Math.min(...this.drag)), this.x(Math.max(...this.drag))];
        make("rect", { class: "select", x: a, y: TOP, width: b - a, height: HEIGHT - TOP - BOTTOM }, this.overlay);
      }
      if (this.cursor === null) { this.readout.textContent = ""; return; }
      const shown = this.lines.filter((line) => line.shown);
      make("line", { class: "cursor", x1: this.x(this.cursor), x2: this.x(this.cursor), y1: TOP, y2: HEIGHT - BOTTOM }, this.overlay);
      const said = shown.map((line) => {
        const i = nearest(line.steps, this.cursor);
        const spread = line.low ? ` (${short(line.low[i])} to ${short(line.high[i])})` : "";
        return `${this.label(line)} ${short(line.values[i])}${spread} at ${this.place(line, i)}`;
      });
      this.readout.textContent = said.join(" · ");
    }

    zoom(low, high) {
      const least = (this.whole[1] - this.whole[0]) / 1e4;
      if (high - low < least) return;
      this.span = [Math.max(low, this.whole[0]), Math.min(high, this.whole[1])];
      this.draw();
    }

    listen() {
      const svg = this.svg;
      svg.addEventListener("pointerdown", (event) => { this.drag = [this.stepAt(event), this.stepAt(event)]; svg.setPointerCapture(event.pointerId); });
      svg.addEventListener("pointermove", (event) => {
        this.cursor = Math.min(Math.max(this.stepAt(event), this.span[0]), this.span[1]);
        if (this.drag) this.drag[1] = this.cursor;
        this.drawCursor();
      });
      svg.addEventListener("pointerup", () => {
        const drag = this.drag;
        this.drag = null;
        if (drag && Math.abs(this.x(drag[1]) - this.x(drag[0])) > 8) this.zoom(Math.min(...drag), Math.max(...drag));
        else this.drawCursor();
      });
      svg.addEventListener("pointercancel", () => { this.drag = null; this.drawCursor(); });
      svg.addEventListener("pointerleave", () => { if (!this.drag) { this.cursor = null; this.drawCursor(); } });
      svg.addEventListener("dblclick", () => { this.span = [...this.whole]; this.draw(); });
      svg.addEventListener("keydown", (event) => this.key(event));
    }

    key(event) {
      const width = this.span[1] - this.span[0], middle = this.cursor ?? (this.span[0] + this.span[1]) / 2;
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (move) this.cursor = Math.min(Math.max(middle + (move * width) / 50, this.span[0]), this.span[1]);
      else if (event.key === "+" || event.key === "=") return this.zoom(middle - width / 4, middle + width / 4), event.preventDefault();
      else if (event.key === "-") return this.zoom(middle - width, middle + width), event.preventDefault();
      else if (event.key === "0" || event.key === "Escape") { this.span = [...this.whole]; this.cursor = null; this.draw(); }
      else return;
      event.preventDefault();
      this.drawCursor();
    }
  }

  // The last step of each run, and whether steps are shown as shares of it: at first where runs differ by three times.
  const ends = data.titles.map((_, run) => Math.max(1, ...data.charts.filter((chart) => chart.x === "step").flatMap((chart) => chart.lines.filter((line) => line.run === run).map((line) => line.steps[line.steps.length - 1]))));
  const shares = { on: ends.length > 1 && Math.max(...ends) >= 3 * Math.min(...ends) };
  const drawn = [];

  // A chart is drawn when its part of the page is opened.
  const drawAll = (root) => {
    for (const figure of root.querySelectorAll("figure.chart:not([data-drawn])")) {
      if (figure.closest("details:not([open])")) continue;
      figure.dataset.drawn = "yes";
      drawn.push(new Chart(figure, data.charts[Number(figure.dataset.chart)]));
    }
  };
  drawAll(document);
  const first = document.querySelector("figure.chart");
  if (ends.length > 1 && first) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "axis";
    const say = () => { button.textContent = shares.on ? "Show steps as they are" : "Show each run at full width"; };
    button.onclick = () => {
      shares.on = !shares.on;
      say();
      for (const chart of drawn) { chart.measure(); chart.draw(); }
    };
    say();
    first.parentElement.before(button);
  }
  for (const details of document.querySelectorAll("details")) details.addEventListener("toggle", () => drawAll(details));
  // On paper nothing is folded.
  // Paper has no triangles to press: everything is open while it prints.
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const details of closed) details.open = true;
    drawAll(document);
  });
  addEventListener("afterprint", () => { for (const details of closed) details.open = false; });
})();
