"""What the tests of Liger's losses share: the check of a paired loss against the truth."""

from prefuse import liger

# ---- the functions, and the installed Liger ------------------------------------------------------


MODULES = {
    "dpo": (liger.LigerFusedLinearDPOLoss, liger.liger_fused_linear_dpo),
    "orpo": (liger.LigerFusedLinearORPOLoss, liger.liger_fused_linear_orpo),
    "simpo": (liger.LigerFusedLinearSimPOLoss, liger.liger_fused_linear_simpo),
    "cpo": (liger.LigerFusedLinearCPOLoss, liger.liger_fused_linear_cpo),
}
