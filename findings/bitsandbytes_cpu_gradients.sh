#!/bin/bash
# bitsandbytes 0.50.2 on a CPU with AVX512-BF16: one evaluation in eval mode, and a 4-bit layer passes no gradient
# afterwards, in train mode too.
#
# QLoRA on a CPU evaluates between training steps. The first pass in eval mode without gradient repacks the weights of
# bitsandbytes.nn.Linear4bit for an inference kernel (nn/modules.py, _convert_weight_packed_for_cpu), and they stay so;
# matmul_4bit then takes that kernel whether or not its input needs a gradient, and it has no backward.
#
# Expected: the same gradient of the input before and after an evaluation.
# Real:     torch warns that gemv_4bit has no autograd kernel, and the gradient of the input is missing (None). With
#           adapters below such a layer, these learn nothing any more, and nothing fails.
# Seen:     before an evaluation: gradient norm 21.3258
#           after an evaluation:  no gradient
# Exit code 0 while this is so, 1 when it is not any more; 2 where the CPU has no AVX512-BF16, so that nothing is repacked.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"  # away from this repository, whose folder kernels/ would be taken for a package
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "bitsandbytes==0.50.2" numpy
"$folder/venv/bin/python" - <<'PY'
import sys
import warnings

import bitsandbytes as bnb
import torch

warnings.simplefilter("ignore")
torch.manual_seed(0)
plain = torch.nn.Linear(64, 128, bias=False)
layer = bnb.nn.Linear4bit(64, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4")
layer.load_state_dict(plain.state_dict())
layer = layer.to("cpu")
x = torch.randn(8, 64)


def gradient():
    leaf = x.clone().requires_grad_()
    out = layer.train()(leaf)
    if not out.requires_grad:
        return None
    out.sum().backward()
    return leaf.grad


before = gradient()
with torch.no_grad():
    layer.eval()(x)
if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
    print("nothing was repacked: this CPU has no AVX512-BF16")
    sys.exit(2)
after = gradient()
print(f"bitsandbytes {bnb.__version__}, torch {torch.__version__}")
print(f"before an evaluation: gradient norm {before.norm():.4f}")
print("after an evaluation: ", "no gradient" if after is None else f"gradient norm {after.norm():.4f}")
same = after is not None and torch.allclose(before, after, rtol=0.1, atol=0.01)
sys.exit(1 if same else 0)
PY
