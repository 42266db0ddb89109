"""Scores before training: which weights to start with, by a look at the loss.

Each function returns one number per weight, the largest to be kept, for every weight of a dense
model that `apply` could mask. They are arguments of `apply`:

| call | positions | how many in each layer |
|---|---|---|
| `apply(model, s, scores=found)` | the best of each layer | by ERK, or another `method` |
| `apply(model, s, method=found, scores=found)` | the best of all layers together | what results |
| `apply(model, s, method=found)` | at random | the same: the layer ratios alone |

The model stays as it was, buffers of norms and torch's global generators included. Gradients are
summed in float32 or finer, whatever the type of the weights. On several ranks each brings its own
batches, and every gradient is the mean over the ranks.
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
    """Score by |w dL/dw|: how far the loss would move without the weight.

    Args:
        model: Dense, on the device of the batches, in training or evaluation mode as wanted.
        batches: At least one of (inputs, targets). The gradient is the mean over them.
        loss: Of outputs and targets, a mean over the batch.

    Raises:
        ValueError: The model has masks already or nothing to mask, a rank has no batch, or the
            gradient is not finite or 0 everywhere. The same on all ranks.

    Reference: Lee et al., "SNIP: Single-shot Network Pruning based on Connection Sensitivity",
    2019, arXiv 1810.02340. The authors take the gradient of one large batch, which is the same
    mean.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[2.0, -1.0]]))
    >>> batches = [(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0]]))]
    >>> snip(layer, batches, lambda output, target: output.sum())
    {'weight': tensor([[2., 3.]])}
    """
    with _copy_of(model) as (twin, weights):
        gradients = _mean_gradient(twin, weights, batches, loss)
        _refuse_zeros(gradients, "the gradient of the loss")
        return {name: (weights[name] * gradients[name]).abs().detach() for name in weights}


def grasp(model: nn.Module, batches: Batches, loss: Loss) -> dict[str, Tensor]:
    """Score by w (Hg): how much of the gradient's squared norm the weight carries.

    g is the gradient and H the Hessian of the mean loss over all batches. Weights whose removal
    would reduce the norm most are kept. The score is 0 if the loss is linear in the weights.

    Args:
        model: As of `snip`.
        batches: As of `snip`; they are read once and used twice.
        loss: As of `snip`.

    Raises:
        ValueError: As of `snip`.
        RuntimeError: Torch has no second derivative of the model.

    Reference: Wang et al., "Picking Winning Tickets Before Training by Preserving Gradient Flow",
    2020, arXiv 2002.07376. Their score is -w (Hg), and their code removes the largest, as here.
    They divide outputs by 200 first: do that in `loss`.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[2.0, -1.0]]))
    >>> batches = [(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0]]))]
    >>> squared = lambda output, target: (output - target).square().sum() / 2
    >>> grasp(layer, batches, squared)  # g = (wx) x = (-1, -3), H = x x^T
    {'weight': tensor([[-20.,  30.]])}
    """
    math_attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with _copy_of(model) as (twin, weights), math_attention:
        kept = list(batches)
        direction = _mean_gradient(twin, weights, kept, loss)
        _refuse_zeros(direction, "the gradient of the loss")

        def flow(outputs: Tensor, targets: Tensor) -> Tensor:
            """Multiply the gradient by its fixed value; the derivative of that is Hg."""
            value = loss(outputs, targets)
            if not value.requires_grad:
                return value
            gradients = torch.autograd.grad(
                value, list(weights.values()), create_graph=True, allow_unused=True
            )
            total = torch.zeros(())
            for gradient, fixed in zip(gradients, direction.values(), strict=True):
                if gradient is not None:
                    total = total + (gradient * fixed).sum()
            return total

        try:
            product = _mean_gradient(twin, weights, kept, flow)
        except RuntimeError as error:
            raise RuntimeError(
                "GraSP needs second derivatives, which could not be taken of "
                f"{type(model).__name__}: {error}; score it by snip or synflow where torch has none"
            ) from error
        return {name: (weights[name] * product[name]).detach() for name in weights}


def synflow(
    model: nn.Module, shape: tuple[int, ...], density: float, iterations: int = 100
) -> dict[str, Tensor]:
    """Score by w dR/dw, with R the sum of outputs for ones if all weights were positive.

    Every weight is replaced by its absolute value. The largest score is 1, since the R of a deep
    network is out of float32's range.

    Args:
        model: Dense.
        shape: Of one input, without the batch.
        density: The share of all weights to keep in the end, in (0, 1]: `apply`'s 1 - sparsity.
        iterations: After each one, the weights that the next lower density would drop, over all
            layers together, are set to 0 and score 0 from then on. The authors take 100. One or a
            few iterations empty whole layers.

    Raises:
        ValueError: As of `snip`; density or iterations are out of range; or nothing flows, in
            float64.

    Reference: Tanaka et al., "Pruning neural networks without any data by iteratively conserving
    synaptic flow", 2020, arXiv 2006.05467.

    >>> network = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
    >>> _ = network[0].weight.data.copy_(torch.tensor([[2.0], [-1.0]]))
    >>> _ = network[1].weight.data.copy_(torch.tensor([[3.0, 5.0]]))
    >>> synflow(network, (1,), density=0.5)  # the paths carry 2 * 3 and 1 * 5; the first is kept
    {'0.weight': tensor([[1.],
            [0.]]), '1.weight': tensor([[1., 0.]])}
    """
    if not 0.0 < density <= 1.0 or iterations < 1:
        raise ValueError(
            f"density is {density}, iterations {iterations}; allowed are (0, 1] and whole numbers "
            "from 1"
        )
    with _copy_of(model) as (twin, weights):
        twin.eval().double()
        with torch.no_grad():
            for tensor in itertools.chain(twin.parameters(), twin.buffers()):
                if tensor.is_floating_point():
                    tensor.abs_()

        device = next(twin.parameters()).device
        ones = torch.ones(1, *shape, dtype=torch.float64, device=device)
        total = sum(weight.numel() for weight in weights.values())
        for iteration in range(1, iterations + 1):
            gradients = _mean_gradient(
                twin, weights, [(ones, ones)], lambda outputs, _: outputs.sum()
            )
            scores = {name: (weights[name] * gradients[name]).detach() for name in weights}
            if iteration == iterations:
                break

            count = max(1, round(total * density ** (iteration / iterations)))
            everything = torch.cat([tensor.flatten() for tensor in scores.values()])
            floor = everything.topk(count).values[-1]
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.masked_fill_(scores[name] < floor, 0.0)

        _refuse_zeros(scores, "the flow through the network")
        peak = max(float(tensor.max()) for tensor in scores.values())
        return {name: (tensor / peak).float() for name, tensor in scores.items()}


SALIENCY: dict[str, Callable[..., dict[str, Tensor]]] = {
    "snip": snip,
    "grasp": grasp,
    "synflow": synflow,
}


def ratios(scores: Mapping[str, Tensor]) -> Distribution:
    """Make the distribution that gives each layer what the best scores of all layers leave in it.

    Reference: the ratios alone carry such methods, with positions drawn anew: Frankle et al.,
    "Pruning Neural Networks at Initialization: Why Are We Missing the Mark?", 2021, arXiv
    2009.08576.

    >>> found = {"a": torch.tensor([5.0, 4.0, 1.0]), "b": torch.tensor([3.0, 0.0])}
    >>> ratios(found)({"a": (3,), "b": (2,)}, 0.6)
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
    """Copy a model and find its maskable weights; forget what it draws from torch's generators."""
    places = list(walk(model))
    if not places:
        raise ValueError(
            f"{type(model).__name__} has nothing to score: no convolution or linear map"
        )
    masked = [name for name, layer, tensor in places if tensor in masked_names(layer)]
    if masked:
        raise ValueError(
            f"{masked[0]} has a mask already; score the dense model, before itop_prune.apply"
        )

    with torch.inference_mode(False), torch.enable_grad():
        twin = copy.deepcopy(unwrap(model))
        weights: dict[str, Tensor] = {
            name: layer.get_parameter(tensor).requires_grad_(True)
            for name, layer, tensor in walk(twin)
        }
        devices = {weight.get_device() for weight in weights.values() if weight.is_cuda}
        with torch.random.fork_rng(devices=sorted(devices)):
            yield twin, weights


def _mean_gradient(
    twin: nn.Module, weights: Mapping[str, Tensor], batches: Batches, loss: Loss
) -> dict[str, Tensor]:
    """Compute the gradient of the mean loss over batches and ranks; zeros for an unused weight."""
    sums = {}
    for name, weight in weights.items():
        dtype = torch.promote_types(weight.dtype, torch.float32)
        sums[name] = torch.zeros_like(weight, dtype=dtype)

    count = 0
    for inputs, targets in batches:
        count += 1
        value = loss(twin(inputs), targets)
        if not value.requires_grad:  # it does not depend on a weight
            continue
        gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total += 0.0 if gradient is None else gradient

    # All ranks learn of one without a batch; else the others would wait for its sums.
    missing = torch.tensor(float(not count), device=next(iter(sums.values())).device)
    if distributed.mean(missing):
        raise ValueError(
            "there is no batch, here or on another rank; give each at least one of (inputs, "
            "targets)"
        )

    means = {name: distributed.mean(total / count) for name, total in sums.items()}
    bad = [name for name, mean in means.items() if not math.isfinite(float(mean.abs().max()))]
    if bad:
        raise ValueError(
            f"the gradient of {', '.join(bad[:5])} is not finite; look at loss, batches and weights"
        )
    return means


def _refuse_zeros(scores: Mapping[str, Tensor], what: str) -> None:
    """Refuse scores that are 0 everywhere, since masks would silently be random."""
    if not any(tensor.any() for tensor in scores.values()):
        raise ValueError(
            f"{what} is 0 in every weight, which ranks none; look at the weights, the loss and the "
            "model"
        )
