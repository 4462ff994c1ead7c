"""What weights come back as from ggml's types, computed by torch on any device: for measuring on a GPU, where ggml's own quantizers would
keep it waiting.

The searches are those of ggml-quants.c with an importance row, step by step, for all blocks at once; sums are taken in another order, so
that some blocks end at another of two nearly equal scales. Nothing here writes a file: files get ggml's own bytes.

Inside, tensors are [values of a group, groups] or [groups of a block, blocks]: sums over the first dimension are fast on a GPU.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rq_gguf.calibration.recorded import Recorded
from rq_gguf.ggml import Ggml
from rq_gguf.types import block, row_bytes

Array = NDArray[Any]

SUPPORTED = frozenset(("q2_k", "iq3_xxs", "q3_k", "iq3_s", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0", "f16", "bf16", "f32"))
"""Types that `dequantized` knows: the ladder's, and the exact ones."""

_BLOCK = 256
_AT_ONCE = {"cpu": 1 << 20}
_AT_ONCE_ON_DEVICE = 1 << 23
"""Weights that are worked on at a time."""
_RECORDED = Recorded()
_MANY_LAUNCHES = frozenset(("q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k"))
"""Types whose quantizers launch 500 to 4000 kernels and take the same way for all values."""
_FOURS = 1 << 18
"""Groups of four values whose nearest point in a codebook is looked for at a time."""
_NEAR = 16
"""Points of a codebook that it is looked for among, the nearest to the rounded values: ggml has 6 on average, rarely more than these."""
_TINY = 1e-15  # GROUP_MAX_EPS
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # kvalues_iq4nl


def dequantized(kind: str, x: Tensor, importance: Tensor, ggml: Ggml) -> Tensor:
    """x as it comes back from a type: float32, as x [..., columns], which is any float. importance: of the same shape, or one that
    expands to it. ggml: is asked for its codebooks.

    kind: in SUPPORTED, with blocks that fit the columns.
    """
    if kind == "f32":
        return x.float()
    if kind in ("f16", "bf16"):
        return x.to(torch.float16 if kind == "f16" else torch.bfloat16).float()
    size = block(kind)[0]
    rows, importance = x.reshape(-1, size), importance.expand(x.shape)
    weights = importance.reshape(-1, size)  # a copy where it was expanded
    made = torch.empty(rows.shape, dtype=torch.float32, device=x.device)
    step = max(1, _AT_ONCE.get(x.device.type, _AT_ONCE_ON_DEVICE) // size)

    def quantizer(some: Tensor, of: Tensor) -> Tensor:
        return _QUANTIZERS[kind](some, of, ggml)

    run = partial(_RECORDED.call, kind, quantizer) if x.is_cuda and kind in _MANY_LAUNCHES else quantizer
    for start in range(0, len(rows), step):
        here = slice(start, start + step)
        made[here] = run(rows[here].float().T.contiguous(), weights[here].float().T.contiguous()).T
    return made.reshape(x.shape)


def _half(x: Tensor) -> Tensor:
    return x.half().float()


def _over(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


def _groups(x: Tensor, n: int) -> Tensor:
    """[256, blocks] -> [n, groups of n values]: those of a block are not neighbours, see _of_block."""
    return x.reshape(-1, n, x.shape[1]).transpose(0, 1).reshape(n, -1)


def _of_block(groups: Tensor, blocks: int) -> Tensor:
    """[groups] -> [groups of a block, blocks]."""
    return groups.reshape(-1, blocks)


def _values(groups: Tensor, blocks: int) -> Tensor:
    """[n, groups] -> [256, blocks], the inverse of _groups."""
    return groups.reshape(len(groups), -1, blocks).transpose(0, 1).reshape(-1, blocks)


def _weighted(x: Tensor, importance: Tensor, factor: float) -> Tensor:
    """The weights of a block's values: their importance, more for the large ones. [256, blocks] each."""
    return importance * (factor * x.square().mean(dim=0) + x.square()).sqrt()


def _largest(x: Tensor) -> Tensor:
    """[n, groups] -> [groups] the value of each group with the largest magnitude, with its sign."""
    return x.gather(0, x.abs().argmax(dim=0, keepdim=True))[0]


def _scale_and_min(x: Tensor, w: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """make_qkx3_quants: (scale, m) [groups] for which scale * (0 to most) - m is near x [n, groups], m >= 0."""
    low, high = x.amin(dim=0).clamp(max=0), x.amax(dim=0)
    flat = high <= low
    wx = w * x
    sum_w, sum_x, sum_x2 = w.sum(dim=0), wx.sum(dim=0), (wx * x).sum(dim=0)

    def sums(least: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        level = (x - least).mul_(inverse).round_().clamp_(0, most)
        weighted = w * level
        return weighted.sum(dim=0), (weighted * level).sum(dim=0), (wx * level).sum(dim=0)

    def error(scale: Tensor, least: Tensor, sum_l: Tensor, sum_l2: Tensor, sum_xl: Tensor) -> Tensor:
        """Sum of w (scale l + least - x)^2."""
        return scale * (scale * sum_l2 + 2 * (least * sum_l - sum_xl)) + least * (least * sum_w - 2 * sum_x) + sum_x2

    # What a flat group divides by 0 is not a number, and nothing compares with that.
    scale, least = (high - low) / most, low
    best = error(scale, least, *sums(least, 1 / scale))
    for step in range(37):
        # From the best minimum so far, as ggml does it.
        sum_l, sum_l2, sum_xl = sums(least, (-0.9 + 0.05 * step + most) / (high - least))
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_least = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        new_scale = torch.where(new_least > 0, sum_xl / sum_l2, new_scale)
        new_least = new_least.clamp(max=0)
        new = error(new_scale, new_least, sum_l, sum_l2, sum_xl)
        better = (determinant > 0) & (new < best)
        scale, least, best = torch.where(better, new_scale, scale), torch.where(better, new_least, least), torch.where(better, new, best)
    return torch.where(flat, 0.0, scale), -torch.where(flat, low, least)


def _positive_levels(x: Tensor, w: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """make_qp_quants: (levels 0 to most [n, blocks], scale [blocks]) for x [n, blocks] >= 0."""
    largest = x.amax(dim=0)
    inverse = _over(torch.full_like(largest, most), largest)

    def error(inverse: Tensor) -> Tensor:
        return (w * (x - _over(torch.ones_like(inverse), inverse) * (x * inverse).round().clamp(max=most)).square()).sum(dim=0)

    best = error(inverse)
    for step in (-4, -3, -2, -1, 1, 2, 3, 4):
        other = _over(torch.full_like(largest, 0.1 * step + most), largest)
        new = error(other)
        better = new < best
        inverse, best = torch.where(better, other, inverse), torch.where(better, new, best)
    level = (x * inverse).round().clamp(0, most)
    wx = w * x
    sum_lx, sum_l2 = (wx * level).sum(dim=0), (w * level * level).sum(dim=0)
    for _ in range(5):
        before = level.clone()
        for x_i, w_i, wx_i, old in zip(x, w, wx, level, strict=True):
            lx, l2 = sum_lx - wx_i * old, sum_l2 - w_i * old * old
            new = (x_i * l2 / lx).round_().clamp_(max=most)
            new_lx, new_l2 = lx + wx_i * new, l2 + w_i * new * new
            better = (lx > 0) & (l2 > 0) & (new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2)
            old.copy_(torch.where(better, new, old))
            sum_lx, sum_l2 = torch.where(better, new_lx, sum_lx), torch.where(better, new_l2, sum_l2)
        if x.device.type == "cpu" and torch.equal(before, level):  # a GPU would have to be waited for
            break
    usable = largest >= _TINY
    return torch.where(usable, level, 0.0), torch.where(usable, _over(sum_lx, sum_l2), 0.0)


def _signed_levels(x: Tensor, w: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """make_qx_quants: (levels -most to most - 1 [n, groups], scale [groups]) for x [n, groups]."""
    largest = _largest(x)
    wx = w * x

    def levels(inverse: Tensor) -> Tensor:
        return (x * inverse).round_().clamp_(-most, most - 1)

    def sums(inverse: Tensor) -> tuple[Tensor, Tensor]:
        level = levels(inverse)
        return (wx * level).sum(dim=0), (w * level * level).sum(dim=0)

    inverse = _over(torch.full_like(largest, -most), largest)
    lx, l2 = sums(inverse)
    scale = _over(lx, l2)
    best = scale * lx
    for step in (*range(-9, 0), *range(1, 10)):
        other = _over(torch.full_like(largest, -(most + 0.1 * step)), largest)
        lx, l2 = sums(other)
        better = (l2 > 0) & (lx * lx > best * l2)
        new = _over(lx, l2)
        inverse, scale, best = torch.where(better, other, inverse), torch.where(better, new, scale), torch.where(better, new * lx, best)
    return levels(inverse), torch.where(largest.abs() >= _TINY, scale, 0.0)


def _with_min(x: Tensor, importance: Tensor, n: int, most: int, most_scale: int, factor: float) -> Tensor:
    """Blocks of groups of n values with a scale and a minimum each: Q2_K, Q4_K, Q5_K."""
    blocks = x.shape[1]
    w = _weighted(x, importance, factor)
    grouped, grouped_w = _groups(x, n), _groups(w, n)
    scale, least = (_of_block(t, blocks) for t in _scale_and_min(grouped, grouped_w, most))
    sum_w = _of_block(grouped_w.sum(dim=0), blocks)
    levels, d = _positive_levels(torch.cat([scale, least], dim=1), sum_w.repeat(1, 2), most_scale)
    d_group, m_group = ((_half(d) * levels)[:, half].reshape(-1) for half in (slice(0, blocks), slice(blocks, None)))
    level = _over(grouped + m_group, d_group.expand_as(grouped)).round().clamp(0, most)
    return _values(d_group * level - m_group, blocks)


def _q2_k(x: Tensor, importance: Tensor, _: Ggml) -> Tensor:
    return _with_min(x, importance, 16, 3, 15, 1.0)


def _q4_k(x: Tensor, importance: Tensor, _: Ggml) -> Tensor:
    return _with_min(x, importance, 32, 15, 63, 2.0)


def _q5_k(x: Tensor, importance: Tensor, _: Ggml) -> Tensor:
    return _with_min(x, importance, 32, 31, 63, 2.0)


def _q3_k(x: Tensor, importance: Tensor, _: Ggml) -> Tensor:
    blocks = x.shape[1]
    grouped, w = _groups(x, 16), _groups(_weighted(x, importance, 2.0), 16)
    scales, d = _signed_levels(_of_block(_signed_levels(grouped, w, 4)[1], blocks), _of_block(w.sum(dim=0), blocks), 32)
    d_group = (_half(d) * scales).reshape(-1)
    return _values(d_group * _over(grouped, d_group.expand_as(grouped)).round().clamp(-4, 3), blocks)


def _q6_k(x: Tensor, importance: Tensor, _: Ggml) -> Tensor:
    blocks = x.shape[1]
    grouped = _groups(x, 16)
    scale = _of_block(_signed_levels(grouped, _groups(importance, 16), 32)[1], blocks)
    largest = _largest(scale)
    inverse = _over(torch.full_like(largest, -128.0), largest)
    d_group = (_half(-largest / 128) * (scale * inverse).round().clamp(max=127)).reshape(-1)
    return _values(d_group * _over(grouped, d_group.expand_as(grouped)).round().clamp(-32, 31), blocks)


def _q8_0(x: Tensor, _: Tensor, __: Ggml) -> Tensor:
    d = x.abs().amax(dim=0) / 127
    return _half(d) * _over(x, d.expand_as(x)).round()


def _iq4_xs(x: Tensor, importance: Tensor, _: Ggml) -> Tensor:
    blocks = x.shape[1]
    values = _iq4_values(x.device)
    between = (values[1:] + values[:-1]) / 2
    grouped, w = _groups(x, 32), _groups(_weighted(x, importance, 2.0), 32)
    wx = w * grouped

    def nearest(inverse: Tensor) -> Tensor:
        return values[torch.bucketize(grouped * inverse, between, right=True)]

    largest = _largest(grouped)
    scale, best = torch.zeros_like(largest), torch.zeros_like(largest)
    for end in (-_IQ4[0], *range(_IQ4[0] - 7, _IQ4[0] + 8)):  # what the largest value becomes
        q = nearest(_over(torch.full_like(largest, float(end)), largest))
        qx, q2 = (wx * q).sum(dim=0), (w * q * q).sum(dim=0)
        better = (q2 > 0) & (qx * qx > best * q2)
        new = _over(qx, q2)
        scale, best = torch.where(better, new, scale), torch.where(better, new * qx, best)
    of_block = _of_block(torch.where(largest.abs() >= _TINY, scale, 0.0), blocks)
    d = -_largest(of_block) / 32
    level = _over(of_block, d.expand_as(of_block)).round().clamp(-32, 31)
    q = nearest(_over(torch.ones_like(largest), (d * level).reshape(-1)))
    return _values((_half(d) * level).reshape(-1) * q, blocks)


@cache
def _iq4_values(device: torch.device) -> Tensor:
    return torch.tensor(_IQ4, dtype=torch.float32, device=device)


def _iq3_xxs(x: Tensor, importance: Tensor, ggml: Ggml) -> Tensor:
    """Each eight signs have an even number of minuses: where they have not, the least important value changes its sign."""
    w = _weighted(x, importance, 2.0)
    sign = torch.where(x < 0, -1.0, 1.0).reshape(-1, 8, x.shape[1])
    least = (w * x * x).reshape(sign.shape).argmin(dim=1, keepdim=True)
    odd = sign.prod(dim=1, keepdim=True)
    sign = sign.scatter(1, least, sign.gather(1, least) * odd).reshape(x.shape)
    return _from_codebook(x * sign, w, "iq3_xxs", ggml, tries=15, fudge=1.0125, refit_all=False) * sign


def _iq3_s(x: Tensor, importance: Tensor, ggml: Ggml) -> Tensor:
    made = _from_codebook(x.abs(), _weighted(x, importance, 2.0), "iq3_s", ggml, tries=9, fudge=1.033, refit_all=True)
    return torch.where(x < 0, -made, made)


def _from_codebook(x: Tensor, w: Tensor, kind: str, ggml: Ggml, *, tries: int, fudge: float, refit_all: bool) -> Tensor:
    """Magnitudes x [256, blocks] in fours that are points of a codebook, groups of 32 with a scale each."""
    blocks = x.shape[1]
    codebook = _codebook(kind, ggml, x.device)
    grouped, w = _groups(x, 32), _groups(w, 32)
    fours, roots = _fours(grouped), _fours(w.sqrt())
    wx = w * grouped

    def sums(q: Tensor) -> tuple[Tensor, Tensor]:
        odd = codebook.odd(q)
        return (wx * odd).sum(dim=0), (w * odd * odd).sum(dim=0)

    largest = grouped.amax(dim=0)
    scale, best = largest / 15, torch.zeros_like(largest)
    points = torch.zeros((8, len(largest)), dtype=torch.int64, device=x.device)
    exact = torch.ones_like(points, dtype=torch.bool)
    if refit_all:
        exact = ~exact
    for step in range(-tries, tries + 1):
        inverse = _over(torch.full_like(largest, 15 + 0.2 * step), largest)
        new_points, new_exact = codebook.nearest(fours, roots, inverse)
        qx, q2 = sums(new_points)
        better = (q2 > 0) & (qx * qx > best * q2)
        new = _over(qx, q2)
        scale, best = torch.where(better, new, scale), torch.where(better, new * qx, best)
        points, exact = torch.where(better, new_points, points), torch.where(better, new_exact, exact)
    refit = (scale > 0) & ~exact.all(dim=0)
    new_points, _ = codebook.nearest(fours, roots, _over(torch.ones_like(scale), scale))
    changed = refit if refit_all else refit & ~exact
    points = torch.where(changed, new_points, points)
    qx, q2 = sums(points)
    scale = torch.where(refit & (q2 > 0), _over(qx, q2), scale)
    of_block = _of_block(torch.where(largest >= _TINY, scale, 0.0), blocks)
    d = of_block.amax(dim=0) / 31
    level = ((_over(of_block, d.expand_as(of_block)) - 1) / 2).round().clamp(0, 15)
    step_size = (_half(d * fudge) * (2 * level + 1)).reshape(-1)
    return _values(step_size * codebook.value(points), blocks)


def _fours(groups: Tensor) -> Tensor:
    """[32, groups] -> [4, 8 * groups], the first fours of all groups first."""
    return groups.reshape(8, 4, -1).transpose(0, 1).reshape(4, -1)


class _Codebook:
    """Points of four values each, by index."""

    def __init__(self, values: Tensor, index: Tensor, near: Tensor) -> None:
        """values: [points, 4] as they come back, in the unit of the scale. index: [8^4] the point of four levels, -1 where there is none;
        near: [8^4, n] the points to choose from then, some of them twice."""
        self._values, self._index, self._near = values, index, near.T.contiguous()
        self._odd = _odd(values)
        # Of the squared distance of a point from x, weighted: what depends on the point is a product with (weights, weights * x).
        self._terms = torch.cat([self._odd.square(), -2 * self._odd], dim=1)

    def odd(self, points: Tensor) -> Tensor:
        """[8, groups] points -> [32, groups] values as the search has them."""
        return self._odd[points].transpose(1, 2).reshape(32, -1)

    def value(self, points: Tensor) -> Tensor:
        """[8, groups] points -> [32, groups] values as they come back."""
        return self._values[points].transpose(1, 2).reshape(32, -1)

    def nearest(self, x: Tensor, weights: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """([8, groups] points, whether rounding alone led there) for x [4, 8 * groups] times inverse [groups]."""
        x = x * inverse.repeat(8)
        level = ((x - 1) / 2).round_().clamp_(0, 7)
        code = (level[0] + 8 * level[1] + 64 * level[2] + 512 * level[3]).to(torch.int64)
        points = self._index[code]
        exact = points >= 0
        for at in (~exact).nonzero()[:, 0].split(_FOURS):
            w = weights.index_select(1, at)
            distance = self._terms @ torch.cat([w, w * x.index_select(1, at)])
            near = self._near.index_select(1, code[at])
            points[at] = near.gather(0, distance.gather(0, near).argmin(dim=0, keepdim=True))[0]
        return points.reshape(8, -1), exact.reshape(8, -1)


def _odd(values: Any) -> Any:
    """Values of a codebook as 2 level + 1, level 0 to 7, with which ggml looks for scales and points."""
    return values.round().clip(max=15)


@cache
def _codebook(kind: str, ggml: Ggml, device: torch.device) -> _Codebook:
    return _Codebook(*(torch.from_numpy(t).to(device) for t in _points(kind, ggml)))


def _points(kind: str, ggml: Ggml) -> tuple[Array, Array, Array]:
    """(values, index, near) as _Codebook takes them. The values are what ggml dequantizes blocks to that hold each point once."""
    n, fours = (256 if kind == "iq3_xxs" else 512), _BLOCK // 4
    points = np.arange(n).reshape(-1, fours)
    data = np.zeros((len(points), row_bytes(kind, _BLOCK)), dtype=np.uint8)  # all signs plus; all scales 0: a quarter, or one
    data[:, :2] = np.frombuffer(np.float16(1).tobytes(), dtype=np.uint8)
    data[:, 2 : 2 + fours] = points & 255
    if kind == "iq3_s":  # the ninth bits, eight to a byte
        data[:, 2 + fours : 10 + fours] = np.packbits((points >> 8).astype(np.uint8), axis=1, bitorder="little")
    values = ggml.dequantize(kind, data, _BLOCK).reshape(n, 4)
    places = 8 ** np.arange(4)
    index = np.full(8**4, -1)
    index[((_odd(values).astype(np.int64) - 1) // 2 * places).sum(axis=1)] = np.arange(n)
    # As iq3xs_init_impl: of the points without rounding, those at the two (three) smallest distances that occur.
    codes = np.arange(8**4)
    distance = np.square(2 * (codes[:, None] // places % 8)[:, None] + 1 - _odd(values)).sum(axis=2)
    order = np.argsort(distance, axis=1, kind="stable")
    steps = np.diff(np.take_along_axis(distance, order, axis=1), axis=1, prepend=-1.0) > 0
    chosen = np.cumsum(steps, axis=1) <= (2 if kind == "iq3_xxs" else 3)
    chosen[index >= 0] = False
    return values, index, np.where(chosen, order, order[:, :1])[:, :_NEAR]


_QUANTIZERS: dict[str, Callable[[Tensor, Tensor, Ggml], Tensor]] = {
    "q2_k": _q2_k,
    "iq3_xxs": _iq3_xxs,
    "q3_k": _q3_k,
    "iq3_s": _iq3_s,
    "iq4_xs": _iq4_xs,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
    "q8_0": _q8_0,
}
