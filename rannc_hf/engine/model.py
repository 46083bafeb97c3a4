"""`RanncModel`: the user's model, trained in stages. It is called like the model it wraps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn

from rannc_hf.capture import Graph
from rannc_hf.capture.ambient import autocast_off, inference_mode_off
from rannc_hf.capture.export import bind_arguments
from rannc_hf.capture.padding import hides_padding
from rannc_hf.config import RanncConfig
from rannc_hf.engine import state
from rannc_hf.engine.batch import Gatherer, GlobalBatch
from rannc_hf.engine.deferred import refuse_unknown
from rannc_hf.engine.lengths import Lengths
from rannc_hf.engine.meter import Meter
from rannc_hf.engine.notices import announce, captured
from rannc_hf.engine.optimizer import OptimizerMap
from rannc_hf.engine.outputs import training_output
from rannc_hf.engine.parameters.store import ParameterStore
from rannc_hf.engine.planning import find_plan_here
from rannc_hf.engine.program import place
from rannc_hf.engine.publication import Publish
from rannc_hf.engine.runtime import Runtime, separate_random_state
from rannc_hf.engine.setup import capture_agreed, check_trained, default_transport, plan_agreed
from rannc_hf.engine.specialised import Specialised
from rannc_hf.engine.split import Driver, split_outputs
from rannc_hf.engine.transport import Transport
from rannc_hf.engine.watched import Watched
from rannc_hf.engine.whole import Whole, generate
from rannc_hf.partition.plan import Plan


class RanncModel(nn.Module):
    """Runs `module` in pipeline stages with replicas, over the ranks of `transport`.

    The partition happens at the first batch: only then are its shapes known. Every rank passes its own shard of the
    global batch, as under DistributedDataParallel.

    - In training, ``model(**batch)`` runs all forwards and backwards and returns the loss over the *global* batch;
      ``loss.backward()`` publishes the gradients, times the gradient it receives, into ``.grad``.
    - Where the model returns no loss, or the option `loss` is "split", it runs the forwards and returns the outputs of
      this rank's own samples; backward of what the script computes from them runs the backwards and publishes.
    - Under ``model.eval()`` it runs forwards and returns the outputs of this rank's own samples, without gradients.

    Args:
        module: any model. Its parameters stay the same objects: those of other ranks are emptied. Parameters built
            under `deferred_init` get memory only on the ranks that own them.
        config: options of planning and training.
        device: where this rank computes.
        compute_dtype: dtype of the copies of the parameters that the model computes with (bf16, fp16); None for their
            own.
        loss_scale: called before each training step; what the loss is multiplied by while the pipeline runs backward,
            a scalar on the device, the same on all ranks. In fp16 small gradients become 0 without. It is the caller's
            to multiply the loss by it again before `loss.backward()`: what the parameters get is scaled as that is.
        transport: connections between ranks; None for those of torch.distributed.
        planner: makes the plan from the graph and the size of the global batch; None for the config's file or search.
        on_plan: called on rank 0 when the plan has been chosen, e.g. to print it.

    Raises:
        ValueError: for parameters or buffers on the meta device whose values nothing tells.
    """

    def __init__(
        self,
        module: nn.Module,
        config: RanncConfig,
        *,
        device: torch.device,
        compute_dtype: torch.dtype | None = None,
        transport: Transport | None = None,
        planner: Callable[[Graph, int], Plan] | None = None,
        on_plan: Callable[[Plan, Graph], None] | None = None,
        loss_scale: Callable[[], torch.Tensor] | None = None,
    ) -> None:
        refuse_unknown(module)
        super().__init__()
        # Not a registered child: parameters and state belong to the user's model, whose class and API survive.
        object.__setattr__(self, "module", module)
        self.module: nn.Module
        self.config, self.device, self.compute_dtype = config, device, compute_dtype
        self.transport = transport if transport is not None else default_transport(config, device)
        self.plan: Plan | None = None
        self._planner = planner
        self._on_plan = on_plan
        self._loss_scale = loss_scale
        self.graph: Graph | None = None
        self.store: ParameterStore | None = None
        self.meter = Meter()
        self.optimizers = OptimizerMap(dict(module.named_parameters()), self.transport.world_size)
        model_config = getattr(module, "config", None)
        self._gatherer = Gatherer(
            self.transport,
            device,
            config.pad,
            config.length_multiple,
            getattr(model_config, "pad_token_id", None),
            getattr(model_config, "max_position_embeddings", None),
            partial(hides_padding, module),
        )
        self._whole = Whole(module, self.transport, device)
        self._watched = Watched(module)
        self._state = ""
        self._lengths = Lengths(module, compute_dtype)
        self._driver = Driver()
        self._at_partition: dict[str, Callable[[], None]] = {}
        self._runtimes: dict[Any, Runtime] = {}
        self._specialised = Specialised()
        self._planned_key: Any = None
        self._steps = 0
        self._running: Graph | None = None
        self._unpublished: tuple[int, frozenset[str], frozenset[str]] | None = None
        self._held_scale: torch.Tensor | None = None

    @property
    def training(self) -> bool:
        """The mode of the user's model, which may be set there too (`unwrap_model(model).eval()`), as under DDP."""
        module: nn.Module | None = self.__dict__.get("module")
        return module.training if module is not None else True

    @training.setter
    def training(self, mode: bool) -> None:
        # nn.Module sets it before there is a model.
        if "module" in self.__dict__:
            self.module.training = mode

    @property
    def partitioned(self) -> bool:
        """Whether the first batch has come and the parameters are placed."""
        return self.plan is not None

    @autocast_off()
    @inference_mode_off()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The loss over the global batch, or all outputs of this rank's own samples: see the class. Collective."""
        if self.training:
            self.meter.begin()
        else:
            self.meter.end()
        gathered = self._gather(args, kwargs, self.training and not torch.is_grad_enabled())
        if self.plan is None:
            self._partition(gathered)
        assert self.store is not None
        known = len(self._runtimes)
        runtime = self._runtime(gathered)
        self._running = runtime.graph
        self.store.refresh()
        self._steps += 1
        with separate_random_state(runtime.graph, self.device):
            if not self.training:
                return self._lengths.returned(runtime.evaluate(gathered, self._steps), gathered, runtime.graph)
            if runtime.graph.split:
                outputs = split_outputs(runtime, gathered, self._steps, self._driver, self._forget)
                self.meter.ran(gathered.samples, gathered.tokens, None, steady=len(self._runtimes) == known)
                return self._lengths.returned(outputs, gathered, runtime.graph)
            self._held_scale = self._gradient_scale()
            loss = runtime.train(gathered, self._steps, self._held_scale)
        self.meter.ran(gathered.samples, gathered.tokens, loss, steady=len(self._runtimes) == known)
        self._unpublished = self._steps, runtime.trained(runtime.graph.differentiated), runtime.conditional
        anchor = torch.zeros((), device=self.device, requires_grad=True)
        return training_output(runtime.graph, Publish.apply(anchor, loss, self, self._steps))

    @inference_mode_off()
    def partition(self, *args: Any, **kwargs: Any) -> Plan:
        """Plan and place the parameters now, for batches like this one, without training on it. Collective.

        The arguments are those of the model: this rank's shard of an example batch. Returns the plan; on a model that
        is partitioned already, that is its plan as it stands.
        """
        if self.plan is None:
            self._partition(self._gather(args, kwargs))
        assert self.plan is not None
        return self.plan

    def _gather(self, args: tuple[Any, ...], kwargs: dict[str, Any], without_gradients: bool = False) -> GlobalBatch:
        problem, batch = None, {}
        try:
            batch = self.cast_inputs(bind_arguments(self.module, args, kwargs))
            self._whole.check(self.training, self.partitioned)
            self._state = self._watched.look(self._whole.active)
            if without_gradients:
                raise ValueError("training mode without gradients: call model.eval() before evaluating under no_grad")
        except (TypeError, ValueError) as error:
            problem = str(error)
        mode = "training" if self.training else "evaluation"
        return self._gatherer.gather(batch, problem, f"{mode} mode" + (f", {self._state}" if self._state else ""))

    def publish(self, scale: torch.Tensor, step: int) -> None:
        """Give the gradients of step `step`, times `scale`, to the parameters. Called by ``loss.backward()``."""
        if self._unpublished is None or self._unpublished[0] != step:
            raise RuntimeError(
                "backward was called for a loss whose gradients are gone: call loss.backward() once for each loss, "
                "before the next forward of the model"
            )
        assert self.store is not None
        (_, trained, conditional), self._unpublished = self._unpublished, None
        self.store.publish(scale if self._held_scale is None else scale / self._held_scale, trained, conditional)

    def _forget(self) -> None:
        """Another backward takes the place of gradients that were not published."""
        self._unpublished = None

    def _gradient_scale(self) -> torch.Tensor | None:
        """What the gradients of this step are multiplied by until they are published; None for 1."""
        if self._loss_scale is None:
            return None
        # Under DDP each rank scales the mean over its own samples, and the average over ranks is taken in fp32. The
        # mean over all samples gives gradients smaller by the number of ranks: so much sooner they would become 0.
        return self._loss_scale().to(self.device, torch.float32) * self.transport.world_size

    @property
    def steps(self) -> int:
        """Forwards so far, of training and evaluation: the random streams of blocks depend on it."""
        return self._steps

    @steps.setter
    def steps(self, value: int) -> None:
        self._steps = value

    def when_partitioned(self, key: str, call: Callable[[], None]) -> None:
        """Call `call()` once the parameters are placed: now if they are. A later call of the same key replaces it."""
        if self.partitioned:
            call()
        else:
            self._at_partition[key] = call

    @property
    def awaits_partition(self) -> tuple[str, ...]:
        """Keys of `when_partitioned` whose turn has not come."""
        return tuple(self._at_partition)

    # -- partition -----------------------------------------------------------------------------------------------

    def _partition(self, batch: GlobalBatch) -> None:
        graph = self._capture(batch, training=True)
        planner = self._planner or partial(self._find_plan, batch=batch)
        plan = plan_agreed(self.transport, graph, self.config, batch.samples, planner)
        self.store = ParameterStore(self.module, graph, plan, self.transport, self.device, self.compute_dtype)
        state.move_buffers(self.module, self.transport, self.device)
        state.guard_state_dict(self.module, self.store)
        self._whole.partitioned(self.store)
        self._watched.place(self.store.originals)
        self._state = self._watched.look(lent=False)
        self.optimizers.partition(set(self.store.owned))
        self.plan, self.graph = plan, graph
        self._planned_key = self._specialised.add(self._specialised.key(True, batch, ""), graph)
        while self._at_partition:
            self._at_partition.pop(next(iter(self._at_partition)))()
        if self.transport.rank == 0:
            announce(graph, plan, self.transport.world_size, self.module)
            if self._on_plan is not None:
                self._on_plan(plan, graph)

    def _find_plan(self, graph: Graph, batch_size: int, batch: GlobalBatch) -> Plan:
        if self.config.plan is not None:
            return Plan.load(self.config.plan)
        return find_plan_here(graph, self.config, batch, self.device, self.transport.world_size)

    def _runtime(self, batch: GlobalBatch) -> Runtime:
        key = self._specialised.key(self.training, batch, self._state)
        if key not in self._runtimes:
            assert self.plan is not None and self.graph is not None and self.store is not None
            planned = key == self._planned_key
            graph = self.graph if planned else self._capture(batch, self.training)
            self._watched.captured()
            self._specialised.forget(self._runtimes)
            self._specialised.add(key, graph)
            if self.training and not planned:
                check_trained(graph, self.graph, self.plan, self.transport.rank)
            program, where = place(graph, self.plan, self.graph), (self.transport, self.device)
            made = Runtime(program, self.plan, self.module, self.store, *where, self.config, planned)
            self._runtimes[key] = made
            if self.transport.rank == 0:
                captured(self._runtimes, batch, self.training, self._state)
        return self._runtimes[key]

    def _capture(self, batch: GlobalBatch, training: bool) -> Graph:
        return capture_agreed(self.transport, self.module, batch, self.compute_dtype, training, self.config.loss)

    def cast_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Floating inputs (images, audio) in the precision the model computes in; targets keep theirs."""
        if self.compute_dtype is None:
            return dict(batch)
        return {
            k: v.to(self.compute_dtype)
            if isinstance(v, torch.Tensor) and v.is_floating_point() and not k.startswith("label")
            else v
            for k, v in batch.items()
        }

    # -- what users call on a model ------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> RanncModel:
        """Set training or evaluation mode, of the user's model too."""
        self.module.train(mode)
        return self

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters this rank holds, all of them before the first batch and inside `whole`."""
        owned = self.store.owned if self.store is not None and not self._whole.active else None
        for name, parameter in self.module.named_parameters(prefix, recurse, remove_duplicate):
            if owned is None or name.removeprefix(f"{prefix}." if prefix else "") in owned:
                yield name, parameter

    def whole(self) -> AbstractContextManager[None]:
        """Inside, every rank's `module` has all parameters and runs plainly: see `engine.whole`. Collective."""
        return self._watched.running(self._whole.entered())

    @property
    def is_whole(self) -> bool:
        """Whether this is inside `whole`."""
        return self._whole.active

    @property
    def generate(self) -> Callable[..., Any]:
        """The module's `generate`, run inside `whole` and in evaluation mode, on this rank's samples. Collective."""
        function: Any = self.module.generate
        return partial(generate, function, self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["module"], name)

    def owns_any(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether any of `parameters` belongs to the wrapped model, on whichever rank it lives."""
        return self.optimizers.knows_any(parameters)

    def loss_uses(self, field: str) -> bool:
        """Whether the last forward returned a loss over the global batch that depends on this field of it."""
        graph = self._running
        return graph is not None and graph.training and not graph.split and field in graph.batch_inputs.values()

    def register_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the partition edit the optimizer's groups in place, down to the parameters this rank holds."""
        self.optimizers.register(optimizer)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Clip the norm over all stages, as `torch.nn.utils.clip_grad_norm_` does over one process. Collective."""
        store = self._partitioned_store("clip_grad_norm_")
        total = store.norm(float(norm_type))
        store.scale_gradients(torch.clamp(max_norm / (total + 1e-6), max=1.0))
        return total

    def clip_grad_value_(self, clip_value: float) -> None:
        """Clip each gradient element of the parameters this rank holds."""
        torch.nn.utils.clip_grad_value_(self._partitioned_store("clip_grad_value_").owned.values(), clip_value)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """For scripts written for DDP. Gradients are exact after every backward, so there is nothing to hold back."""
        yield

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The module's state before the first batch; after it, no rank has the whole, and this says what to call."""
        result: dict[str, Any] = self.module.state_dict(*args, **kwargs)
        return result

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a whole state, as `load_full_state_dict` does."""
        if self.store is None:
            return self.module.load_state_dict(state_dict, strict, assign)
        if not strict or assign:
            raise ValueError("a partitioned model loads whole states only: leave out strict=False and assign=True")
        self.load_full_state_dict(state_dict)
        return nn.modules.module._IncompatibleKeys([], [])

    def full_state_dict(self, only: Collection[str] | None = None) -> dict[str, torch.Tensor]:
        """The whole state on the CPU of rank 0, an empty dict elsewhere. Collective.

        only: names of parameters, equal on all ranks: others may be missing.
        """
        self.meter.end()
        if self.store is None:
            return state.whole(self.module) if self.transport.rank == 0 else {}
        return state.gather(self.module, self.store, self.transport, only)

    def load_full_state_dict(self, values: Mapping[str, torch.Tensor]) -> None:
        """Load a whole state, given alike on every rank; each keeps its part.

        Raises:
            ValueError: naming missing, unexpected or misshapen entries.
        """
        state.load(self.module, self.store, values)

    def _partitioned_store(self, call: str) -> ParameterStore:
        if self.store is None:
            raise RuntimeError(f"{call} before the first batch: there are no gradients yet")
        return self.store
