"""The whole system as Ray actors: starts them, gives them out behind the protocols, and ends them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import ActorAlreadyExistsError, GetTimeoutError
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.buffer import BufferActor, RayReferenceStore, refilled
from actors.device_turns import DeviceTurns, OwnDevices, Turns
from actors.engine_processes import remove_files_of_ended_engines
from actors.learner_group import RayLearner
from actors.learner_rank import LearnerRank
from actors.prometheus import PrometheusSink, metrics_url
from actors.reference import ReferenceSampler, run_stage
from actors.reward import RewardWorker
from actors.reward_pool import RayRewardPool
from actors.rollout_pool import RayRolloutPool
from actors.waiting import Actor, within
from actors.watched import settled
from actors.weight_transfer.backends import with_backend
from cluster.connection import connect
from cluster.engines import EngineActors, reserve_one
from cluster.planning.memory import colocation_obstacle, dtype_on_gpu
from cluster.planning.placement import Bundle
from cluster.planning.ray_placement import Places, place_on_cluster
from cluster.planning.shapes import model_shape
from cluster.scaling import Scaler
from cluster.start import Start
from dphrl.config.loading import InputError
from dphrl.config.schema import Config
from dphrl.processors import waiting_variables
from dphrl.protocols import EnginesLostError, OnGraded, Parts, WholeReference
from dphrl.stopping import keep_handlers
from dphrl.tracking.sinks import Sink
from dphrl.types import Prompt

NAME_POLL_INTERVAL_S = 0.2
NAME_TIMEOUT_S = 60.0
HIDDEN_GPUS = {"runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}}


class RaySystem:
    """Actors in one placement group. Use as a context manager: leaving it ends them and frees their resources."""

    def __init__(self, config: Config, model_dir: str, probes: Sequence[Prompt]) -> None:
        self.config, self.model_dir, self.probes = config, model_dir, probes
        self._pools: tuple[RayRolloutPool, RayRewardPool] | None = None
        self._scaler: Scaler | None = None
        self._worker_groups: dict[Any, Any] = {}

    def __enter__(self) -> RaySystem:
        with keep_handlers():  # Ray sets one for SIGTERM, which ends the process on the spot
            connect(self.config)
        try:
            bundles, group = place_on_cluster(self.config)
            self._places = Places(bundles, group)
            self._with_gpus = any(bundle.num_gpus for bundle in bundles)
            self.config = with_backend(self.config, with_gpus=self._with_gpus)
            self._spawn_all(bundles)
        except BaseException:
            # The placement group ends with the connection that made it.
            ray.shutdown()
            raise
        return self

    def _spawn_all(self, bundles: Sequence[Bundle]) -> None:
        place = self._places.options
        # Ray would show all GPUs of the node to an actor that has none.
        self._without_gpu = HIDDEN_GPUS if any(bundle.num_gpus for bundle in bundles) else {}
        self._learner_options = place["learner"]
        self._ranks = [self._spawn_rank(i, options) for i, options in enumerate(self._learner_options)]
        self._bundles = bundles
        self._check_shared_memory()
        mine = {place: bundle for place, bundle in enumerate(bundles) if bundle.role == "rollout"}
        devices = {bundle.index: self._shared_devices(bundle) for bundle in mine.values()}
        self._actors = EngineActors(self.config, self.model_dir, self._places.group, mine, devices)
        shared = [*self._actors.engines.values()] if any(devices.values()) else []
        self._turns = DeviceTurns(shared, self._ranks, self.config.sync.timeout_s) if shared else None
        self._workers = [self._spawn_worker(i, options) for i, options in enumerate(place["reward"])]
        self._num_workers = len(self._workers)  # that ever were
        self._buffer = self._spawn_buffer()

    def _spawn_buffer(self) -> Any:
        return self._spawn_anew(BufferActor, "buffer", 0, {"num_cpus": 0} | self._without_gpu)()

    def __exit__(self, *exc_info: object) -> None:
        self._actors.remove_temporary_files()
        self._places.release()
        ray.shutdown()
        remove_files_of_ended_engines(self.config.folder)

    def _spawn_rank(self, index: int, options: dict[str, Any]) -> Any:
        return self._spawn_anew(LearnerRank, "learner", index, options | rank_variables())(self.config, index)

    def _spawn_anew(self, *of_actor: Any) -> Callable[..., Any]:
        """As `_spawn`, where an actor of before may have the name until Ray has seen its end."""

        def start(*arguments: Any) -> Any:
            deadline = time.monotonic() + NAME_TIMEOUT_S
            while True:
                try:
                    return self._spawn(*of_actor)(*arguments)
                except ActorAlreadyExistsError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(NAME_POLL_INTERVAL_S)

        return start

    def _renew_ranks(self) -> None:
        for rank in self._ranks:
            ray.kill(rank)
        for i, options in enumerate(self._learner_options):
            self._ranks[i] = self._spawn_rank(i, options)  # one by one: after a failure, the next try ends those

    async def _move_ranks(self, say: Callable[[str], None]) -> None:
        """Other ranks in place of the present ones, on other nodes where theirs are gone."""
        await asyncio.gather(*map(settled, self._ranks))
        for rank in self._ranks:
            ray.kill(rank)
        # These wait for Ray, and engines and graders go on meanwhile.
        await asyncio.to_thread(self._places.find_room, "learner", self.config, say)
        await asyncio.to_thread(self._renew_ranks)

    async def restart_learner(self, on_ready: Callable[[str], None]) -> None:
        """See `protocols.System`. Raises an Exception, which says what was waited for; then it may be called again."""
        self._learning.begin_anew()  # first: the new ranks have the initial policy, whoever publishes it
        await self._move_ranks(on_ready)
        await self._start_of(on_ready, engines={}, workers=()).run()

    def _spawn(self, actor_class: Any, role: str, index: int, options: dict[str, Any]) -> Callable[..., Any]:
        """The actor's constructor, under the name by which Ray's dashboard and `ray list actors` show it."""
        return cast(
            Callable[..., Any], actor_class.options(name=f"{self.config.run_name}-{role}-{index}", **options).remote
        )

    def _shared_devices(self, engine: Bundle) -> Sequence[str] | None:
        """GPUs of the learner ranks beside which a colocated engine runs; None for one that has its own."""
        if not engine.shares_gpus_of:
            return None
        found = self._ask_ranks(engine.shares_gpus_of, lambda rank: rank.gpu_ids.remote())
        return [str(gpu) for ids in found for gpu in ids]

    def _ask_ranks(self, places: Iterable[int], call: Callable[[Actor], Any]) -> list[Any]:
        """What these ranks answer as soon as they are there. Raises RuntimeError when one is not within
        learner.timeout_s."""
        limit, places = self.config.learner.timeout_s, sorted(places)
        try:
            return cast(list[Any], ray.get([call(self._ranks[i]) for i in places], timeout=limit))
        except GetTimeoutError:
            who = ", ".join(map(str, places))
            raise RuntimeError(f"waited {limit:g} s (learner.timeout_s) for learner ranks {who} to start") from None

    def _check_shared_memory(self) -> None:
        """Raises InputError, before anything is loaded, when an engine does not fit beside its learner rank."""
        shared = {rank for bundle in self._bundles for rank in bundle.shares_gpus_of}
        sizes = [size for size in self._ask_ranks(shared, lambda rank: rank.gpu_bytes.remote()) if size]
        shape = model_shape(self.model_dir, trust_remote_code=self.config.model.trust_remote_code) if sizes else None
        if shape and (obstacle := colocation_obstacle(self.config, shape, dtype_on_gpu(self.config), min(sizes))):
            raise InputError(obstacle)

    def renew_learner(self, config: Config) -> bool:
        """Continue with another configuration: fresh learner ranks, the same running engines and reward workers.

        Returns False, and does nothing, when the configurations differ in what engines and workers were started with.
        """
        config = with_backend(config, with_gpus=self._with_gpus)
        if _engine_settings(config) != _engine_settings(self.config):
            return False
        self.config = config
        self._renew_ranks()
        self._check_shared_memory()
        return True

    def sinks(self) -> list[Sink]:
        """Sinks for the run's metrics that it only has on Ray."""
        return [PrometheusSink(self.config.run_name, self._live_metrics)] if self.config.tracking.prometheus else []

    def _live_metrics(self) -> dict[str, float]:
        """The pools' queue depths at this moment, from any thread; none before `start`."""
        return {name: value for pool in self._pools or () for name, value in pool.live_metrics().items()}

    async def start(self, on_ready: Callable[[str], None]) -> Parts:
        """Wait until every actor is up, and report each. Returns the parts; the engines are not refit yet."""
        facts = await self._start_of(on_ready, self._actors.engines, self._workers).run()
        dtype, layout = str(facts["dtype"]), learner_layout(self.config)
        turns: Turns = self._turns or OwnDevices()
        rollouts = RayRolloutPool(self._actors.engines, self.config, self.probes, dtype, self._actors, turns)
        rewards = RayRewardPool(self._workers, self.config, self)
        self._pools = rollouts, rewards
        if self._scaler is not None:
            self._scaler.up(rollouts, rewards)
        if self.config.tracking.prometheus:
            on_ready(f"metrics for Prometheus: {metrics_url()}")
        timeout_s = self.config.learner.timeout_s
        self._learning = RayLearner(self._ranks, dtype, layout, turns, facts.get("compute"), timeout_s)
        return Parts(self._learning, rollouts, rewards)

    def _start_of(
        self, on_ready: Callable[[str], None], engines: Mapping[int, Actor], workers: Sequence[Actor]
    ) -> Start:
        return Start(
            engines,
            self._actors.start,
            self._ranks,
            workers,
            lambda: self._move_ranks(on_ready),
            self.model_dir,
            self.config.learner.timeout_s,
            self._turns,
            on_ready,
        )

    @asynccontextmanager
    async def listen(self, folder: Path) -> AsyncIterator[None]:
        """See `protocols.System`."""
        self._scaler = Scaler(folder, self.config, self._actors, self)
        async with self._scaler.serving():
            yield
        self._scaler = None

    async def start_worker(self) -> Any:
        """One more reward worker, up, in a placement group of its own. One that does not come up leaves nothing."""
        index = self._num_workers
        self._num_workers += 1
        bundle, group = await reserve_one(self.config, "reward", index, with_gpus=self._with_gpus)
        options = {"num_cpus": bundle.num_cpus, "num_gpus": bundle.num_gpus}
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        limit, worker = self.config.learner.timeout_s, None
        try:
            worker = self._spawn_worker(index, options | {"scheduling_strategy": strategy})
            await within(worker.ready.remote(), limit, "learner.timeout_s", f"reward worker {index} to start")
        except BaseException:
            if worker is not None:
                ray.kill(worker)
            remove_placement_group(group)
            raise
        self._workers.append(worker)
        self._worker_groups[worker] = group
        return worker

    async def end_worker(self, worker: Any) -> None:
        """End a reward worker, and free what it held if its placement group is its own."""
        if worker in self._workers:
            self._workers.remove(worker)
        ray.kill(worker)
        if (group := self._worker_groups.pop(worker, None)) is not None:
            remove_placement_group(group)

    def _spawn_worker(self, index: int, options: dict[str, Any]) -> Any:
        # Graders hold no state: Ray may start a dead one again, and the pool retries what it lost.
        hidden = {} if options["num_gpus"] else self._without_gpu
        spawn = self._spawn(RewardWorker, "reward", index, options | {"max_restarts": -1} | hidden)
        return spawn(self.config.reward)

    async def fill_reference(
        self, prompts: Sequence[Prompt], identity: Mapping[str, str], folder: Path, on_graded: OnGraded
    ) -> tuple[RayReferenceStore, dict[str, float]]:
        """Run the reference stage in its own actor, which ends when the buffer is filled.

        That actor goes on as long as one engine is left. Then others start here, and another actor goes on with what is
        on disk.
        """
        assert self._pools is not None, "the parts are up"
        rollouts, _ = self._pools
        for attempt in range(self.config.rollout.max_replacements + 1):
            # The stage samples and scores, and for both the devices are ready then.
            if self._turns is not None:
                await self._turns.decode()
            try:
                near_perfect, exploration, counts = await run_stage(
                    lambda: self._spawn_sampler(rollouts.engines),
                    lambda sampler: sampler.fill.remote(prompts, identity, str(folder.absolute())),
                    on_graded,
                    self.config.rollout.timeout_s + self.config.learner.timeout_s,
                )
                break
            except EnginesLostError:
                if attempt == self.config.rollout.max_replacements:
                    raise
                await rollouts.refit(self._learning)
        store = await self._hold(lambda: self._load_buffer(folder), near_perfect, exploration, folder)
        return store, counts

    def _spawn_sampler(self, engines: Mapping[int, Actor]) -> Any:
        options = {"num_cpus": 0} | self._without_gpu
        actors = (engines, self._workers, self._ranks)
        return self._spawn_anew(ReferenceSampler, "reference", 0, options)(self.config, *actors)

    async def adopt_reference(self, buffer: WholeReference, folder: Path) -> RayReferenceStore:
        """Put a buffer read from disk into the buffer actor."""
        what = "the buffer actor to take over the reference buffer"

        async def put() -> None:
            await within(self._buffer.put.remote(buffer), self.config.learner.timeout_s, "learner.timeout_s", what)

        return await self._hold(put, buffer.near_perfect, buffer.exploration, folder)

    async def _hold(
        self,
        fill: Callable[[], Awaitable[None]],
        near_perfect: frozenset[str],
        exploration: frozenset[str],
        folder: Path,
    ) -> RayReferenceStore:
        """Fill the buffer actor. One that dies, now or later, gets a successor, filled from `folder`."""
        await refilled().until_done(lambda num_lost: self._revive_buffer(folder) if num_lost else fill())
        revive, timeout_s = partial(self._revive_buffer, folder), self.config.learner.timeout_s
        return RayReferenceStore(self._buffer, near_perfect, exploration, revive, timeout_s)

    async def _revive_buffer(self, folder: Path) -> Any:
        """A new buffer actor in place of the present one, with the buffer that is in `folder`."""
        ray.kill(self._buffer)
        self._buffer = await asyncio.to_thread(self._spawn_buffer)
        await self._load_buffer(folder)
        return self._buffer

    async def _load_buffer(self, folder: Path) -> None:
        loading = self._buffer.load.remote(str(folder.absolute()))
        await within(loading, self.config.learner.timeout_s, "learner.timeout_s", f"the buffer actor to read {folder}")


def _engine_settings(config: Config) -> list[Any]:
    """Everything that actors other than the learner were made from, or that decides how many there are."""
    learner = config.learner
    return [
        *(config.model, config.rollout, config.reward, config.sync, config.cluster, config.deterministic),
        *(config.max_sequence_tokens, learner.num_ranks, learner.cpus_per_rank, learner.accelerator),
    ]


def learner_layout(config: Config) -> str:
    """What a checkpoint of the learner on Ray must be restored into."""
    layout = f"deepspeed, {config.learner.num_ranks} ranks, ZeRO-{config.learner.zero_stage}"
    return layout if config.model.lora is None else f"{layout}, {config.model.lora.layout}"


def rank_variables() -> dict[str, Any]:
    """Options of a learner rank's actor: the variables of its process."""
    return {"runtime_env": {"env_vars": waiting_variables()}}
