"""Teachers: frozen modules, the taps that are captured by forward hooks, and what identifies them."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ddcache.errors import ConfigError, DdcacheError, TeacherError

if TYPE_CHECKING:
    from ddcache.config import Factory, TapConfig, TeacherConfig

ModelInputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
Preprocess = Callable[[dict[str, Tensor]], ModelInputs]


@dataclass(frozen=True)
class FrozenModel:
    """What a teacher factory returns when the module alone does not say it all.

    Args:
        module: the frozen module.
        preprocess: turns the source's inputs (name -> tensor, batch first) into the module's arguments: a tensor,
            a tuple, or a mapping of keyword arguments. It runs on a background thread. None passes those of the
            source's inputs that the module's `forward` names. A teacher with taps of several row domains may give a
            mapping from a tap's `keyed_by` tuple to such a callable; `()` is the domain of one row a sample.
        facts: whatever `preprocess` depends on (sizes, tokenizer, digests of look-up tables), as JSON values. It is
            part of the fingerprint: change the preprocessing, change the facts.
    """

    module: nn.Module
    preprocess: Preprocess | Mapping[tuple[str, ...], Preprocess] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Teacher:
    """A frozen teacher that is ready to run: in eval mode, on its device, its taps found."""

    name: str
    config: TeacherConfig
    model: FrozenModel

    def inputs(self, batch: dict[str, Tensor], keyed_by: tuple[str, ...] = ()) -> ModelInputs:
        """Return the module's arguments for the source's inputs of one batch.

        Args:
            batch: the source's inputs, by name.
            keyed_by: the row domain that the batch belongs to.

        Raises:
            ConfigError: the module needs an input that the source does not give, or there is no preprocessing for
                this domain.
            TeacherError: the preprocessing raised.
        """
        preprocess = self.model.preprocess
        if isinstance(preprocess, Mapping):
            if keyed_by not in preprocess:
                raise ConfigError(
                    f"teachers.{self.name}: a tap is keyed by {list(keyed_by)}, but the factory gives preprocessing "
                    f"for {[list(k) for k in preprocess]} only"
                )
            preprocess = preprocess[keyed_by]
        if preprocess is None:
            return accepted_inputs(self.model.module, batch, f"teacher {self.name!r}")
        try:
            return preprocess(batch)
        except Exception as error:
            raise TeacherError(
                f"teacher {self.name!r}: preprocessing raised {type(error).__name__}: {error}"
            ) from error

    def fingerprint(self) -> dict[str, Any]:
        """Return what the features of this teacher depend on, taps aside, as JSON values."""
        return {
            "factory": self.config.factory,
            "args": dict(self.config.args),
            "facts": dict(self.model.facts),
            "autocast": self.config.autocast,
            "weights": digest_weights(self.model.module),
        }

    def parameters(self) -> int:
        """Return the number of parameters."""
        return sum(p.numel() for p in self.model.module.parameters())

    @torch.inference_mode()
    def features(self, inputs: ModelInputs, taps: list[str], size: int) -> dict[str, Tensor]:
        """Run one forward pass and return the pooled output of each tap.

        Args:
            inputs: what `inputs` returned.
            taps: names of the taps to capture.
            size: number of samples in the batch.

        Returns:
            tap -> (size, ...) tensor, in the dtype that the module computed in.

        Raises:
            TeacherError: the module raised, or a tap's output is no tensor of `size` samples.
        """
        device = torch.device(self.config.device)
        configs = {tap: self.config.taps[tap] for tap in taps}
        arguments, keywords = _as_call(inputs, device)
        autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.config.autocast is not None:
            autocast = torch.autocast(device.type, dtype=getattr(torch, self.config.autocast))
        with capture(self.model.module, {c.module for c in configs.values()}) as outputs, autocast:
            try:
                self.model.module(*arguments, **keywords)
            except Exception as error:
                raise TeacherError(f"teacher {self.name!r} raised {type(error).__name__}: {error}") from error
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        features = {}
        for tap, config in configs.items():
            where = f"teachers.{self.name}.taps.{tap}"
            if config.module not in outputs:
                raise TeacherError(f"{where}: module {config.module!r} was not called in the forward pass")
            value = select_output(outputs[config.module], config.select, where)
            if value.ndim == 0 or len(value) != size:
                raise TeacherError(
                    f"{where}: expected the output of {config.module!r} to have {size} samples on its first axis, "
                    f"found shape {tuple(value.shape)}"
                )
            features[tap] = pool(value, config.pool, mask, where)
        return features


def load_teacher(name: str, config: TeacherConfig) -> Teacher:
    """Call a teacher's factory, freeze its module and find its taps.

    Raises:
        ConfigError: the factory or a tap's module does not exist; the nearest module names are listed.
        TeacherError: the factory raised.
    """
    where = f"teachers.{name}"
    made = call_factory(config, where, TeacherError)
    model = made if isinstance(made, FrozenModel) else FrozenModel(made)
    if not isinstance(model.module, nn.Module):
        raise ConfigError(f"{where}.factory: expected it to return a torch.nn.Module or FrozenModel, found {made!r}")
    for tap, tap_config in config.taps.items():
        find_module(model.module, tap_config.module, f"{where}.taps.{tap}.module")
    model.module.eval().requires_grad_(False).to(config.device)
    return Teacher(name, config, model)


def call_factory(factory: Factory, where: str, error_type: type[Exception], **extra: object) -> Any:
    """Import and call a factory; what it raises becomes one message that names the field."""
    function = factory.load(where, **extra)
    try:
        return function(**extra, **factory.args)
    except DdcacheError:
        raise
    except Exception as error:
        raise error_type(f"{where}: {factory.factory} raised {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def capture(module: nn.Module, names: set[str]) -> Iterator[dict[str, Any]]:
    """Collect the outputs of submodules, by name, of the forward passes inside the block (the last pass wins)."""
    outputs: dict[str, Any] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs[name] = output

        return hook

    handles = [module.get_submodule(name).register_forward_hook(keep(name)) for name in sorted(names)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def find_module(module: nn.Module, name: str, where: str) -> nn.Module:
    """Return the submodule of this name ('' is the module itself), or raise `ConfigError` with the nearest names."""
    modules: dict[str, nn.Module] = dict(module.named_modules())
    if name in modules:
        return modules[name]
    names = [n for n in modules if n]
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.4) or names[:5]
    raise ConfigError(f"{where}: {type(module).__name__} has no module {name!r}; the nearest are {near}")


def select_output(output: Any, select: str | int | None, where: str) -> Tensor:
    """Return the tensor in a module's output: itself, or the item `select` of a tuple, list or mapping.

    Raises:
        ConfigError: there is no such item, it is no tensor, or `select` is needed and missing.
    """
    if isinstance(output, Tensor):
        if select is not None:
            raise ConfigError(f"{where}.select: expected a tuple or mapping to select {select!r} from, found a tensor")
        return output
    if isinstance(output, Mapping):
        choices: list[Any] = list(output.keys())
    elif isinstance(output, tuple | list):
        choices = list(range(len(output)))
    else:
        raise ConfigError(f"{where}: expected a tensor, tuple or mapping, found {type(output).__name__}")
    if select not in choices:
        problem = "is needed" if select is None else f"{select!r} is not there"
        raise ConfigError(
            f"{where}.select: {problem}: the module returns a {type(output).__name__}; choose one of {choices}"
        )
    value = output[select]
    if not isinstance(value, Tensor):
        raise ConfigError(f"{where}.select: expected item {select!r} to be a tensor, found {type(value).__name__}")
    return value


def pool(value: Tensor, how: str, mask: Tensor | None, where: str) -> Tensor:
    """Pool a batch of token sequences (B, T, D) or feature maps (B, C, H, W).

    `none` keeps all, `cls` takes token 0, `mean` averages over tokens or pixels, `tokens:K` averages K consecutive
    segments of the sequence (the segments of `torch.nn.functional.adaptive_avg_pool1d`), giving (B, K, D). A feature
    map counts as the sequence of its pixels in row order, with its channels as D.

    Args:
        value: the module's output.
        how: the pooling.
        mask: (B, T), non-zero where a token is real; padding is left out of `mean` and `tokens:K`. The engine passes
            the module's `attention_mask` argument.
        where: the field that errors name.

    Raises:
        ConfigError: the output has no tokens to pool.
    """
    if how == "none":
        return value
    if value.ndim == 4:
        tokens_BTD, mask = value.flatten(2).transpose(1, 2), None
    elif value.ndim == 3:
        tokens_BTD = value
    else:
        raise ConfigError(
            f"{where}.pool: {how!r} expects an output of shape (batch, tokens, channels) or (batch, channels, height, "
            f"width), found {tuple(value.shape)}; use 'none'"
        )
    if how == "cls":
        return tokens_BTD[:, 0]
    size, length = tokens_BTD.shape[:2]
    if mask is None or mask.shape != (size, length):
        mask = torch.ones(size, length)
    segments = 1 if how == "mean" else int(how.partition(":")[2])
    if segments > length:
        raise ConfigError(f"{where}.pool: {how!r} expects at least {segments} tokens, found {length}")
    weights_BKT = _segment_weights(mask.to(tokens_BTD.device), segments)
    pooled_BKD = weights_BKT.to(tokens_BTD.dtype) @ tokens_BTD
    return pooled_BKD[:, 0] if how == "mean" else pooled_BKD


def _segment_weights(mask_BT: Tensor, segments: int) -> Tensor:
    """Return (B, K, T) averaging weights; segment k of n tokens is [floor(k n / K), ceil((k + 1) n / K))."""
    real_BT = mask_BT != 0
    position_BT = real_BT.cumsum(1) - 1
    count_B = real_BT.sum(1).clamp_min(1)
    k_K = torch.arange(segments, device=mask_BT.device)
    start_BK = torch.div(k_K * count_B[:, None], segments, rounding_mode="floor")
    end_BK = -torch.div(-(k_K + 1) * count_B[:, None], segments, rounding_mode="floor")
    inside_BKT = (position_BT[:, None] >= start_BK[..., None]) & (position_BT[:, None] < end_BK[..., None])
    weights_BKT = (inside_BKT & real_BT[:, None]).to(torch.float32)
    return weights_BKT / weights_BKT.sum(2, keepdim=True).clamp_min(1)


def accepted_inputs(module: nn.Module, inputs: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Return those of `inputs` that the module's `forward` names (all of them if it takes `**kwargs`).

    Raises:
        ConfigError: `forward` requires an argument that is not among the inputs.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(inputs)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if missing := [p.name for p in named if p.default is p.empty and p.name not in inputs]:
        raise ConfigError(
            f"{what}: {type(module).__name__}.forward needs {missing}, but the source gives {sorted(inputs)}; "
            f"rename the argument, or give the factory's FrozenModel a preprocess"
        )
    return {p.name: inputs[p.name] for p in named if p.name in inputs}


def digest_weights(module: nn.Module) -> str:
    """Return a SHA-256 over every parameter and buffer: name, dtype, shape and bytes, in name order."""
    sha = hashlib.sha256()
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        # View as bytes: numpy has no bfloat16, and the digest must not depend on a conversion.
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        sha.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return sha.hexdigest()


def tap_fingerprint(config: TeacherConfig, tap: str) -> dict[str, Any]:
    """Return what the features of one tap depend on, its teacher aside, as JSON values."""
    own: TapConfig = config.taps[tap]
    return {**own.model_dump(mode="json"), "keyed_by": list(config.key_of(tap))}


def _as_call(inputs: ModelInputs, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(inputs, Tensor):
        return (move(inputs),), {}
    if isinstance(inputs, tuple):
        return tuple(move(v) for v in inputs), {}
    return (), {name: move(v) for name, v in inputs.items()}
