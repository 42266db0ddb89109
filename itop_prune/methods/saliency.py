"""Scores before training: which weights to start with, from a look at the loss. For `apply(scores=, method=)`.

Each function returns one number per weight, the largest to be kept, for every weight of a dense
model that `apply` could mask. Where they are used decides what they mean:

| call | positions | how many in each layer |
|---|---|---|
| `apply(model, s, scores=found)` | the best of each layer | ERK, or another `method` |
| `apply(model, s, method=found, scores=found)` | the best of all layers together | what comes out |
| `apply(model, s, method=found)` | at random | the same, the layer ratios alone |

The model is left as it was, buffers of norms and torch's global generators included. Gradients are
summed in float32 or finer, whatever the weights are. On several ranks every gradient is the mean
over them: each brings batches of its own.
"""

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from itop_prune import distributed, topology
from itop_prune.layers.maskable import unwrap, walk
from itop_prune.layers.masked_layer import masked_names
from itop_prune.methods.distributions import Distribution, Shapes

Loss = Callable[[Tensor, Tensor], Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]


def snip(model: nn.Module, batches: Batches, loss: Loss) -> dict[str, Tensor]:
    """Return |w dL/dw|, how far the loss would go if the weight went.

    Args: model: Dense, on the device of the batches, in the mode (training, evaluation) to look at
        it in. batches: At least one of (inputs, targets); the gradient is the mean over them. loss:
        Of outputs and targets, a mean over the batch.

    Raises: ValueError: The model has masks already or nothing to mask, a rank has no batch, or the
        gradient is not finite or 0 everywhere. The same on all ranks.

    Reference: Lee et al., "SNIP: Single-shot Network Pruning based on Connection Sensitivity",
    2019, arXiv 1810.02340.
    Several batches: its authors take the gradient of one large batch, which is the same mean.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[2.0, -1.0]]))
    >>> snip(layer, [(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0]]))], lambda output, target: output.sum())
    {'weight': tensor([[2., 3.]])}
    """
    with _copy_of(model) as (twin, weights):
        found = _mean_gradient(twin, weights, batches, loss)
        _check_any(found, "the gradient of the loss")
        return {name: (weights[name] * found[name]).abs().detach() for name in weights}


def grasp(model: nn.Module, batches: Batches, loss: Loss) -> dict[str, Tensor]:
    """Return w (Hg), how much of the gradient's squared norm the weight carries: what would reduce it most is kept.

    g is the gradient and H the Hessian of the mean loss over all batches: 0 where the loss is
    linear in the weights. Arguments and errors are those of `snip`, and a RuntimeError where torch
    has no second derivative; the batches are gone through twice.

    Reference: Wang et al., "Picking Winning Tickets Before Training by Preserving Gradient Flow",
    2020, arXiv 2002.07376. Of its score -w (Hg) its authors' code removes the largest, as here.
    They divide outputs by 200 first: do that in `loss`.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[2.0, -1.0]]))
    >>> squared = lambda output, target: (output - target).square().sum() / 2  # g = (wx) x = (-1, -3), H = x x^T
    >>> grasp(layer, [(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0]]))], squared)
    {'weight': tensor([[-20.,  30.]])}
    """
    with (
        _copy_of(model) as (twin, weights),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        kept = list(batches)
        towards = _mean_gradient(twin, weights, kept, loss)
        _check_any(towards, "the gradient of the loss")

        def flow(outputs: Tensor, targets: Tensor) -> Tensor:
            value, present = loss(outputs, targets), list(weights.values())
            if not value.requires_grad:
                return value
            gradients = torch.autograd.grad(value, present, create_graph=True, allow_unused=True)
            pairs = zip(gradients, towards.values(), strict=True)
            return sum(((g * v).sum() for g, v in pairs if g is not None), torch.zeros(()))

        try:
            product = _mean_gradient(twin, weights, kept, flow)
        except RuntimeError as error:
            raise RuntimeError(
                f"GraSP needs second derivatives, which could not be taken of {type(model).__name__}: {error}; "
                "score it by snip or synflow where torch has none"
            ) from error
        return {name: (weights[name] * product[name]).detach() for name in weights}


def synflow(
    model: nn.Module, shape: tuple[int, ...], density: float, iterations: int = 100
) -> dict[str, Tensor]:
    """Return w dR/dw of R, the sum of outputs for an input of ones when every weight is its absolute value.

    The largest score is 1: of a deep network R itself is out of float32's range.

    Args: model: Dense. shape: Of one input, without the batch. density: The share of all weights
        that shall be kept in the end, in (0, 1]: `apply`'s 1 - sparsity. iterations: After each one
        the weights that the next lower density would drop, over all layers together, are set to 0,
        and score 0 from then on. The authors take 100; with one or a few whole layers are emptied.

    Raises:
        ValueError: As `snip`; density or iterations are out of range; or nothing flows, in float64.

    Reference: Tanaka et al., "Pruning neural networks without any data by iteratively conserving
    synaptic flow", 2020, arXiv 2006.05467.

    >>> network = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
    >>> _ = network[0].weight.data.copy_(torch.tensor([[2.0], [-1.0]]))
    >>> _ = network[1].weight.data.copy_(torch.tensor([[3.0, 5.0]]))
    >>> synflow(network, (1,), density=0.5)  # the paths carry 2 * 3 and 1 * 5; half of the weights make one of them
    {'0.weight': tensor([[1.],
            [0.]]), '1.weight': tensor([[1., 0.]])}
    """
    if not 0.0 < density <= 1.0 or iterations < 1:
        raise ValueError(
            f"density is {density}, iterations {iterations}; allowed are (0, 1] and whole numbers from 1"
        )
    with _copy_of(model) as (twin, weights):
        twin.eval().double()
        with torch.no_grad():
            for tensor in itertools.chain(twin.parameters(), twin.buffers()):
                if tensor.is_floating_point():
                    tensor.abs_()
        ones = torch.ones(1, *shape, dtype=torch.float64, device=next(twin.parameters()).device)
        total = sum(weight.numel() for weight in weights.values())
        for iteration in range(1, iterations + 1):
            found = _mean_gradient(twin, weights, [(ones, ones)], lambda outputs, _: outputs.sum())
            scores = {name: (weights[name] * found[name]).detach() for name in weights}
            if iteration < iterations:
                count = max(1, round(total * density ** (iteration / iterations)))
                floor = (
                    torch.cat([tensor.flatten() for tensor in scores.values()])
                    .topk(count)
                    .values[-1]
                )
                with torch.no_grad():
                    for name, weight in weights.items():
                        weight.masked_fill_(scores[name] < floor, 0.0)
        _check_any(scores, "the flow through the network")
        peak = max(float(tensor.max()) for tensor in scores.values())
        return {name: (tensor / peak).float() for name, tensor in scores.items()}


SALIENCY: dict[str, Callable[..., dict[str, Tensor]]] = {
    "snip": snip,
    "grasp": grasp,
    "synflow": synflow,
}


def ratios(scores: Mapping[str, Tensor]) -> Distribution:
    """Return the distribution that keeps in each layer what the best scores of all layers together leave in it.

    Reference: that the ratios alone carry such methods, positions drawn anew: Frankle et al.,
    "Pruning Neural Networks
    at Initialization: Why Are We Missing the Mark?", 2021, arXiv 2009.08576.

    >>> ratios({"a": torch.tensor([5.0, 4.0, 1.0]), "b": torch.tensor([3.0, 0.0])})({"a": (3,), "b": (2,)}, 0.6)
    {'a': 0.6666666666666666, 'b': 0.5}
    """

    def shared(shapes: Shapes, density: float) -> dict[str, float]:
        weights = {name: scores[name].numel() for name in shapes}
        count = round(density * sum(weights.values()))
        shares = topology.shares_of_best({name: scores[name] for name in shapes}, count)
        return {name: shares[name] / weights[name] for name in shapes}

    shared.__name__ = "ratios"
    return shared


@contextlib.contextmanager
def _copy_of(model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
    """Give a copy to look at and its maskable weights by name; forget what it draws from the generators."""
    places = list(walk(model))
    if not places:
        raise ValueError(
            f"{type(model).__name__} has nothing to score: no convolution or linear map"
        )
    if masked := [name for name, layer, tensor in places if tensor in masked_names(layer)]:
        raise ValueError(
            f"{masked[0]} has a mask already; score the dense model, before itop_prune.apply"
        )
    with torch.inference_mode(False), torch.enable_grad():
        twin = copy.deepcopy(unwrap(model))
        weights: dict[str, Tensor] = {
            name: layer.get_parameter(tensor).requires_grad_(True)
            for name, layer, tensor in walk(twin)
        }
        used = {weight.get_device() for weight in weights.values() if weight.is_cuda}
        with torch.random.fork_rng(devices=sorted(used)):
            yield twin, weights


def _mean_gradient(
    twin: nn.Module, weights: Mapping[str, Tensor], batches: Batches, loss: Loss
) -> dict[str, Tensor]:
    """Return the gradient of the mean loss over batches and ranks, of each weight; zeros where a weight is not used."""
    sums = {
        name: torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32))
        for name, w in weights.items()
    }
    seen = 0
    for inputs, targets in batches:
        seen += 1
        value = loss(twin(inputs), targets)
        if not value.requires_grad:  # it does not depend on a weight
            continue
        found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
        for total, gradient in zip(sums.values(), found, strict=True):
            total += 0.0 if gradient is None else gradient
    starved = torch.tensor(float(not seen), device=next(iter(sums.values())).device)
    if distributed.mean(
        starved, starved
    ):  # told to all, or the others would wait for this rank's sums
        raise ValueError(
            "there is no batch, here or on another rank; give each at least one of (inputs, targets)"
        )
    means = {name: distributed.mean(total / seen, total) for name, total in sums.items()}
    if bad := [name for name, mean in means.items() if not math.isfinite(float(mean.abs().max()))]:
        raise ValueError(
            f"the gradient of {', '.join(bad[:5])} is not finite; look at loss, batches and weights"
        )
    return means


def _check_any(found: Mapping[str, Tensor], what: str) -> None:
    """Refuse what is 0 everywhere: no weight would be better than another, and masks silently random."""
    if not any(tensor.any() for tensor in found.values()):
        raise ValueError(
            f"{what} is 0 in every weight, which ranks none; look at the weights, the loss and the model"
        )
