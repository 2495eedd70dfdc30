"""The pictures of losses show the losses: values and slopes are their equations', for every loss that has a name."""

import pytest
import torch

import prefuse
from prefuse.engine.report.loss_curves import curves_of, draw_losses
from prefuse.losses.names import LOSSES


def test_a_curve_of_pairs_is_the_equation_over_the_log_ratio():
    (curve,) = curves_of(prefuse.DPO(0.3), "dpo", points=9)
    assert curve.ratios.tolist() == [-40, -30, -20, -10, 0, 10, 20, 30, 40]
    expected = torch.nn.functional.softplus(-0.3 * curve.ratios)
    torch.testing.assert_close(curve.losses, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(curve.slopes, -0.3 * torch.sigmoid(-0.3 * curve.ratios), rtol=1e-6, atol=1e-9)


def test_a_loss_with_labels_has_a_curve_for_each():
    good, bad = curves_of(prefuse.KTO(0.3, 2.0, 0.5), "kto", points=9)
    assert (good.label, bad.label) == ("kto, desirable", "kto, undesirable")
    torch.testing.assert_close(good.losses, 2 * torch.sigmoid(-0.3 * good.ratios), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(bad.losses, 0.5 * torch.sigmoid(0.3 * bad.ratios), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_can_be_drawn_and_its_slope_is_that_of_its_values(name):
    for curve in curves_of(prefuse.loss_named(name), name, points=401):
        assert curve.losses.isfinite().all()
        assert curve.slopes.isfinite().all()
        if name in ("aot", "aot_unpaired", "beta_dpo"):  # of a whole batch: no point stands for itself
            continue
        rise = (curve.losses[2:] - curve.losses[:-2]) / (curve.ratios[2:] - curve.ratios[:-2])
        # Away from corners; and losses leave in float32.
        assert (rise - curve.slopes[1:-1]).abs().median() < 1e-2 * curve.slopes.abs().max() + 1e-5


def test_a_picture_is_written(tmp_path):
    draw_losses(tmp_path / "losses.png", ["dpo", "kto", "slic"], [0.1, 0.5])
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="unknown loss 'dpoo'; did you mean dpo"):
        draw_losses(tmp_path / "losses.png", ["dpoo"], [0.1])
    for losses, betas in ((["dpo"], []), ([], [0.1])):
        with pytest.raises(ValueError, match=r"expected losses .* and betas, got"):
            draw_losses(tmp_path / "losses.png", losses, betas)
