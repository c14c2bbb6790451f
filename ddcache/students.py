"""Students: ordinary modules, of which two submodules are named: the hidden state, and the head that maps it on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddcache.distill import StudentState
from ddcache.errors import ConfigError, TrainError
from ddcache.teachers import accepted_inputs, call_factory, capture, find_module

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ddcache.config import StudentConfig

EXPORTED = "student.safetensors"
PREDICT_BATCH = 8192


def load_student(name: str, config: StudentConfig) -> nn.Module:
    """Build a student, untrained.

    Raises:
        ConfigError: its factory does not exist or gives no module.
    """
    module = call_factory(config, f"students.{name}", TrainError)
    if not isinstance(module, nn.Module):
        raise ConfigError(f"students.{name}.factory: expected it to return a torch.nn.Module, found {module!r}")
    return module


def load_exported(name: str, config: StudentConfig, folder: Path) -> nn.Module:
    """Build a student and load the weights that the run in `folder` exported."""
    module = load_student(name, config)
    module.load_state_dict(load_file(folder / EXPORTED))
    return module


def export_student(student: nn.Module, folder: Path) -> None:
    """Write a student's plain state dict, which loads into its class with safetensors alone."""
    # Clones: safetensors refuses tensors that share memory, such as tied weights.
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in student.state_dict().items()}
    save_file(state, folder / EXPORTED)


@torch.inference_mode()
def predict(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the module's outputs in eval mode, (n,) or (n, C) float32, computed in batches."""
    was_training = module.training
    module.eval()
    chosen = accepted_inputs(module, inputs, "student")
    size = len(next(iter(chosen.values())))
    outputs = [
        module(**{n: tensor[at : at + PREDICT_BATCH] for n, tensor in chosen.items()}).float().cpu()
        for at in range(0, size, PREDICT_BATCH)
    ]
    module.train(was_training)
    return torch.cat(outputs)


class StudentHooks:
    """Runs a student and keeps what distillation needs of it: the hidden state, the output and the detached head."""

    def __init__(self, name: str, config: StudentConfig, student: nn.Module) -> None:
        self._name, self._student, self._hidden = name, student, config.hidden
        self._head = find_module(student, config.head, f"students.{name}.head")
        find_module(student, config.hidden, f"students.{name}.hidden")
        self._capture = capture(student, {config.hidden})

    def __enter__(self) -> StudentHooks:
        """Register the hook."""
        self._outputs = self._capture.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Remove it."""
        self._capture.__exit__(*error)

    def state(self, inputs: Mapping[str, Tensor]) -> StudentState:
        """Run the student on the inputs of a batch.

        Raises:
            ConfigError: `hidden` does not give one vector a sample.
        """
        output = self._student(**accepted_inputs(self._student, inputs, f"students.{self._name}"))
        hidden = self._outputs[self._hidden]
        if not isinstance(hidden, Tensor) or hidden.ndim != 2:
            shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise ConfigError(
                f"students.{self._name}.hidden: expected module {self._hidden!r} to give (batch, width), found {shape}"
            )
        return StudentState(hidden, output, self._apply_head)

    def _apply_head(self, hidden: Tensor) -> Tensor:
        fixed = {n: t.detach() for n, t in (*self._head.named_parameters(), *self._head.named_buffers())}
        result: Tensor = torch.func.functional_call(self._head, fixed, (hidden,))
        return result


@torch.no_grad()
def check_student(name: str, config: StudentConfig, student: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Return the width of a student's hidden state, after a look at a few samples at whether its modules fit together.

    Raises:
        ConfigError: `hidden` or `head` doesn't exist, or the head doesn't turn the hidden state into the output.
    """
    student.eval()
    with StudentHooks(name, config, student) as hooks:
        try:
            state = hooks.state(inputs)
            headed = state.head(state.hidden)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ConfigError(
                f"students.{name}: {type(student).__name__} raised {type(error).__name__}: {error}"
            ) from error
    if headed.numel() != state.output.numel() or not torch.allclose(
        headed.reshape(state.output.shape), state.output, rtol=1e-3, atol=1e-4
    ):
        raise ConfigError(
            f"students.{name}.head: expected module {config.head!r} to turn the output of {config.hidden!r} into the "
            f"student's output, found a difference; name the two modules between which nothing else happens"
        )
    return state.hidden.shape[1]
