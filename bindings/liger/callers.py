"""Who calls Liger's losses: not every TRL."""

import sys
import warnings
from pathlib import Path


def say_if_trl_never_calls() -> None:
    """TRL's trainers called Liger's losses up to 1.12; later ones have `use_liger_kernel` and another way."""
    trl = sys.modules.get("trl")
    if trl is None or not getattr(trl, "__file__", None):
        return
    trainers = Path(trl.__file__).parent / "trainer"
    if not any("LigerFusedLinear" in file.read_text(encoding="utf-8") for file in trainers.glob("*_trainer.py")):
        warnings.warn(
            f"TRL {trl.__version__} never calls liger_kernel's preference losses, so prefuse.liger.patch() changes "
            "nothing in its trainers: use prefuse.trl",
            stacklevel=3,
        )
