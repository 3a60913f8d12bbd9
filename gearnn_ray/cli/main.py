"""The jobs, from a command line to an exit code: parse the configuration, run the job, print its result."""

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gearnn_ray.cli import early_checks, output, results
from gearnn_ray.config.adapt import AdaptConfig
from gearnn_ray.config.camera import CameraConfig
from gearnn_ray.config.command_line import ConfigT, JobOptions, parse_command_line
from gearnn_ray.config.doctor import DoctorConfig
from gearnn_ray.config.release_jobs import EvaluateConfig, SweepConfig
from gearnn_ray.config.serve import ServeConfig
from gearnn_ray.config.split import SplitConfig
from gearnn_ray.config.transfer import CopyConfig, ExportConfig, SignConfig
from gearnn_ray.config.upkeep import GcConfig, VerifyConfig
from gearnn_ray.config.watch import WatchConfig
from gearnn_ray.core.errors import UserError, storage_problem
from gearnn_ray.reporting.progress import Plan, reporter, split_plan
from gearnn_ray.reporting.tracking import Tracked, tracked
from gearnn_ray.store.releases import Store

if TYPE_CHECKING:
    from gearnn_ray.video.live import LiveStream

_SPLIT = "Split a network into one base and a small adaptor per distortion level, and publish them (GearNN, CVPR 2020)."
_EVALUATE = "Evaluate every method at every level of a release on the same images: how much accuracy for how many bytes."
_SWEEP = "Try several budgets M on the levels of a release, and recommend the smallest that is nearly as good as the best."
_WATCH = "Take a video through the adaptive network: every frame with the network of its own distortion level."
_ADAPT = "Steer a camera's knobs by the network's gradient (OneAdapt, SoCC 2023), and compare every rival over the same video."
_CAMERA = "Be a camera whose encoder the service steers: post segments, and encode the next ones with the knobs in the answers."
_PULL = "Copy a release from another store into this one: every digest is verified, and the tag is copied last."
_PUSH = "Copy a release from this store to another one: every digest is verified, and the tag is copied last."
_EXPORT = (
    "Write the network of one level, or of all, as a file that runs without this package: ONNX, torch.export or safetensors."
)
_SIGN = "Sign a release: its name and the digest of its manifest, which holds the digest of everything in it."
_GC = "Delete what no tag of a store leads to and nobody has used for a while, and cached images that nobody needs."
_VERIFY = "Read everything that a tag of a store leads to, and every stage record, and say what is wrong. Changes nothing."
_DOCTOR = "Say what this machine is good for, and what is wrong. Starts no Ray, and leaves the store unchanged."
_SERVE = "Serve releases over HTTP: one base network, and for each frame the adaptor of its own distortion level."


def run_split(arguments: Sequence[str]) -> int:
    """`jobs/split.py`. Exit codes: 0 every level was published, 1 a level failed, 2 invalid configuration."""

    def run(config: SplitConfig, options: JobOptions) -> bool:
        early_checks.check_split(config)
        from gearnn_ray.offline import pipeline
        from gearnn_ray.offline.held_back import TRIALS

        trials = tuple(TRIALS) if config.selection.held_back else ()
        plan = split_plan(config.levels, config.selection.against == "clean", trials)
        with _reporter("split", config.name, config, options, plan) as emit:
            outcome = pipeline.split(config, emit)
            emit.conclude(*results.split_results(config, outcome), succeeded=not outcome.failed)
        output.show_split(config, outcome, options.json_lines)
        return not outcome.failed

    return _run(SplitConfig, arguments, _SPLIT, run)


def run_evaluate(arguments: Sequence[str]) -> int:
    """`jobs/evaluate.py`. Exit codes: 0 everything was evaluated, 1 a part failed, 2 invalid configuration."""

    def run(config: EvaluateConfig, options: JobOptions) -> bool:
        early_checks.check_release_job(config)
        from gearnn_ray.evaluation import pipeline

        with _reporter("evaluate", config.release, config, options) as emit:
            outcome = pipeline.evaluate(config, emit, shlex.join(["jobs/evaluate.py", *arguments]))
            emit.conclude(*results.evaluation_results(config, outcome), succeeded=not outcome.failed)
        output.show_evaluation(config, outcome, options.json_lines)
        return not outcome.failed

    return _run(EvaluateConfig, arguments, _EVALUATE, run)


def run_sweep(arguments: Sequence[str]) -> int:
    """`jobs/sweep.py`. Exit codes: 0 every budget was evaluated at every level, 1 a part failed, 2 invalid configuration."""

    def run(config: SweepConfig, options: JobOptions) -> bool:
        early_checks.check_release_job(config)
        from gearnn_ray.sweep import pipeline

        with _reporter("sweep", config.release, config, options) as emit:
            outcome = pipeline.sweep(config, emit)
            emit.conclude(*results.sweep_results(config, outcome), succeeded=not outcome.failed)
        output.show_sweep(config, outcome, options.json_lines)
        return not outcome.failed

    return _run(SweepConfig, arguments, _SWEEP, run)


def run_adapt(arguments: Sequence[str]) -> int:
    """`jobs/adapt.py`. Exit codes: 0 every segment was computed, 1 a segment failed, 2 invalid configuration."""

    def run(config: AdaptConfig, options: JobOptions) -> bool:
        early_checks.check_adapt(config)
        from gearnn_ray.knobs import pipeline

        with reporter({}, options.json_lines) as emit:
            outcome = pipeline.adapt(config, emit, shlex.join(["jobs/adapt.py", *arguments]))
        output.show_adapt(config, outcome, options.json_lines)
        return not outcome.failed

    return _run(AdaptConfig, arguments, _ADAPT, run)


def run_serve(arguments: Sequence[str]) -> int:
    """`jobs/serve.py`. Serves until Ctrl-C or SIGTERM, then 0; 1 if Ray Serve ended first, 2 invalid configuration."""

    def run(config: ServeConfig, options: JobOptions) -> bool:
        try:
            early_checks.check_bundles(config)
            try:
                from gearnn_ray.service import deployment as service
            except ModuleNotFoundError as error:
                raise UserError(f"{error.name} is not installed: install the extra `serve` (uv sync --extra serve)") from error

            with service.serving(config) as serving:
                output.show_serving(serving, options.json_lines)
                service.wait_until_gone()
        except KeyboardInterrupt:  # Ctrl-C and SIGTERM
            return True
        print("error: another program ended Ray Serve; start this job again", file=sys.stderr)
        return False

    return _run(ServeConfig, arguments, _SERVE, run)


def run_watch(arguments: Sequence[str]) -> int:
    """`jobs/watch.py`. Exit codes: 0 the video has ended, or Ctrl-C or SIGTERM ended it; 1 the source failed after its first
    frame; 2 invalid configuration, or no video.
    """

    def run(config: WatchConfig, options: JobOptions) -> bool:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        early_checks.check_watch(config)
        from gearnn_ray.video.sources import SourceError
        from gearnn_ray.video.watching import Seen, watched

        seen, problem = Seen(), None
        try:
            with _live_page(config, options) as live, closing(watched(config, seen, live)) as lines:
                output.show_lines(lines, seen, options.json_lines)
        except KeyboardInterrupt:
            pass
        except SourceError as error:
            if not seen.frames:
                raise
            problem = str(error)
        output.show_watch(config, seen, problem, options.json_lines)
        return problem is None

    return _run(WatchConfig, arguments, _WATCH, run)


def run_camera(arguments: Sequence[str]) -> int:
    """`jobs/camera.py`. Exit codes: 0 the video has ended, or Ctrl-C or SIGTERM ended it, and segments were answered; 1 none was,
    or the source failed after its first segment; 2 invalid configuration, or no video.
    """

    def run(config: CameraConfig, options: JobOptions) -> bool:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        early_checks.check_camera(config)
        from gearnn_ray.knobs.camera import Filmed, film
        from gearnn_ray.video.sources import SourceError

        filmed, problem = Filmed(), None
        try:
            with closing(film(config, filmed)) as lines:
                output.show_camera_lines(lines, options.json_lines)
        except KeyboardInterrupt:
            pass
        except SourceError as error:
            if not filmed.segments:
                raise
            problem = str(error)
        output.show_camera(filmed, problem, options.json_lines)
        return problem is None and filmed.answered > 0

    return _run(CameraConfig, arguments, _CAMERA, run)


def run_pull(arguments: Sequence[str]) -> int:
    """`gearnn pull`. Exit codes: 0 the release is in this store, 2 invalid configuration, or a damaged release."""
    return _run(CopyConfig, arguments, _PULL, lambda config, options: _copy(config, options, config.other, config.store))


def run_push(arguments: Sequence[str]) -> int:
    """`gearnn push`. Exit codes: 0 the release is in the other store, 2 as of `run_pull`."""
    return _run(CopyConfig, arguments, _PUSH, lambda config, options: _copy(config, options, config.store, config.other))


def _copy(config: CopyConfig, options: JobOptions, source: str, target: str) -> bool:
    if not config.other:
        raise UserError("no other store is given: expected one behind the release, such as name:tag s3://bucket/prefix")
    origin, goal = Store(source), Store(target)
    digest = origin.copy_to(goal, config.release, config.require_signature)
    name, pinned, _ = config.release.partition("@")
    if not pinned:
        name, _, tag = config.release.partition(":")
        goal.tag(name, tag, digest)
    output.show_copied(config.release, f"{name}@{digest}", goal, options.json_lines)
    return True


def run_export(arguments: Sequence[str]) -> int:
    """`gearnn export`. Exit codes: 0 the file is written, 2 invalid configuration, or a network that cannot be exported."""

    def run(config: ExportConfig, options: JobOptions) -> bool:
        if not config.level or not config.file:
            raise UserError(
                "no level or no file is given: expected name:tag LEVEL FILE, such as name:latest jpeg-10 jpeg-10.onnx"
            )
        from gearnn_ray.serving.export import export_level, export_levels

        release = Store(config.store).pull(config.release, config.require_signature)
        if config.level == "all":
            path = export_levels(release, config.file, config.image_size, config.trust)
        else:
            path = export_level(release, config.level, config.file, config.image_size, config.trust)
        output.show_exported(f"{release.name}@{release.digest}", config.level, path, options.json_lines)
        return True

    return _run(ExportConfig, arguments, _EXPORT, run)


def run_sign(arguments: Sequence[str]) -> int:
    """`gearnn sign`. Exit codes: 0 the release is signed, 2 invalid configuration."""

    def run(config: SignConfig, options: JobOptions) -> bool:
        output.show_signed(config.release, Store(config.store).sign(config.release, config.key), options.json_lines)
        return True

    return _run(SignConfig, arguments, _SIGN, run)


def run_gc(arguments: Sequence[str]) -> int:
    """`jobs/gc.py`. Exit codes: 0 what should go is listed or deleted, 2 invalid configuration, or a tag that cannot be read."""

    def run(config: GcConfig, options: JobOptions) -> bool:
        from gearnn_ray.data.cache_limits import limit_cache

        day, data = 86_400.0, config.data
        files = Store(config.store).gc(config.grace * day, dry_run=not config.delete)
        cache = Path(data.cache).expanduser()
        images = limit_cache(cache, config.grace * day, data.max_age * day, data.max_gib * 2**30, dry_run=not config.delete)
        output.show_gc(config, files, images, options.json_lines)
        return True

    return _run(GcConfig, arguments, _GC, run)


def run_verify(arguments: Sequence[str]) -> int:
    """`jobs/verify.py`. Exit codes: 0 everything is as it was published, 1 something is wrong, 2 invalid configuration."""

    def run(config: VerifyConfig, options: JobOptions) -> bool:
        store = Store(config.store)
        found = store.verify()
        output.show_problems(store, found, options.json_lines)
        return not found

    return _run(VerifyConfig, arguments, _VERIFY, run)


def run_doctor(arguments: Sequence[str]) -> int:
    """`jobs/doctor.py`. Exit codes: 0 nothing is wrong, 1 something is, 2 invalid configuration."""

    def run(config: DoctorConfig, options: JobOptions) -> bool:
        from gearnn_ray.cli.diagnosis import TESTED, diagnose
        from gearnn_ray.cli.machine import gather

        findings = diagnose(gather(config, TESTED))
        output.show_findings(findings, options.json_lines)
        return all(finding.state != "wrong" for finding in findings)

    return _run(DoctorConfig, arguments, _DOCTOR, run)


def _reporter(
    job: str, name: str, config: SplitConfig | EvaluateConfig | SweepConfig, options: JobOptions, plan: Plan | None = None
) -> Tracked:
    """What shows a job's progress. name: of its release."""
    # the address of a store may hold credentials
    given = config.model_dump(mode="json", exclude={"store"})
    return tracked(reporter(plan or {}, options.json_lines), options.track, f"{job}-{name}", given)


@contextmanager
def _live_page(config: WatchConfig, options: JobOptions) -> Iterator["LiveStream | None"]:
    """The page of a stream while it is watched, where a port is given for it."""
    if config.port is None:
        yield None
        return
    from gearnn_ray.video.live import LiveStream
    from gearnn_ray.video.watching import stream_name

    try:
        from gearnn_ray.service.stream_pages import stream_page_at
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: install the extra `serve` (uv sync --extra serve)") from error
    live = LiveStream(stream_name(config))
    with stream_page_at(config.port, live) as address:
        output.show_page(address, options.json_lines)
        yield live


def _run(kind: type[ConfigT], arguments: Sequence[str], description: str, run: Callable[[ConfigT, JobOptions], bool]) -> int:
    """A job's exit code. `run` returns whether all parts succeeded; Ray and torch take seconds to import, so it imports them."""
    try:
        config, options = parse_command_line(kind, arguments, description)
        if "store" in kind.model_fields:
            config = config.model_copy(update={"store": resolve_store(config.store)})  # type: ignore[attr-defined]
        return 0 if run(config, options) else 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if (problem := storage_problem(error)) is None:
            raise
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; run the same command again to continue", file=sys.stderr)
        return 130


def resolve_store(uri: str) -> str:
    """The store's URI; in a submitted job a relative path is in the home folder, because Ray later deletes the job's folder."""
    in_ray_package = "working_dir_files" in Path.cwd().parts
    if "://" in uri or Path(uri).expanduser().is_absolute() or not in_ray_package:
        return os.path.expanduser(uri)
    return str(Path.home() / "gearnn_ray" / uri)
