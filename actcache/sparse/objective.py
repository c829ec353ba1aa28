"""What a sparse MLP is trained for: the loss of a batch.

In: scaled rows of the input and the target. Out: the loss, its error term, and the latents. A sparsity penalty enters
here and nowhere else.

The L1 penalty weighs each latent by the norm of its decoder column, because small latents with long columns would evade
it, and it is multiplied by the square root of the target's width, so that one `l1` means the same for narrow and wide
sites.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from actcache.sparse.model import SparseMLP


def sparse_loss(
    mlp: SparseMLP, x_BD: Tensor, y_BD: Tensor, l1: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The training loss on scaled rows, its error term, and the latents `(B, F)`.

        loss = mean_B( sum_D (y_hat - y)^2 )  +  l1 * sqrt(D_out) * mean_B( mean_F( a_f * |w_f| ) )

    `y` has variance 1 per dimension on average, so the error is `D_out x FVU`. `|w_f|` is the norm of latent f's
    decoder column, so that small latents with long columns do not escape the penalty. Norms of rows grow like
    `sqrt(D_out)`; with that factor both terms grow like `D_out`, and one `l1` means the same for narrow and wide sites.
    The matrix products run in `dtype`, everything else in float32.
    """
    with torch.autocast(x_BD.device.type, dtype, enabled=dtype != torch.float32):
        a_BF = mlp.encode(x_BD)
        # The decoder norms are one more output, so that the penalty needs no pass over the (B, F) latents.
        norms_F = mlp.decoder.weight.norm(dim=0, keepdim=True)
        decoder_DF = torch.cat([mlp.decoder.weight, norms_F])
        out_BD = F.linear(a_BF, decoder_DF, F.pad(mlp.decoder.bias, (0, 1))).float()
    error = F.mse_loss(out_BD[:, :-1], y_BD) * mlp.d_out
    penalty = out_BD[:, -1].mean() * (l1 * math.sqrt(mlp.d_out) / mlp.n_latents)
    return error + penalty, error, a_BF
