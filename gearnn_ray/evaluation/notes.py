"""What a reader of a report must know about how each method was made, one paragraph each."""

from collections.abc import Collection, Iterator, Mapping

from gearnn_ray.config.recipe import PAPERS
from gearnn_ray.evaluation.baselines import TITLES, tuning_images
from gearnn_ray.evaluation.plan import Plan
from gearnn_ray.serving.mixing import STEPS


def notes(
    plan: Plan, rates: Mapping[str, float], tuning_level: str, stability: tuple[float, float] | None, methods: Collection[str]
) -> Iterator[str]:
    """The paragraphs, those about all methods first.

    rates: learning rate by method. stability: the chosen α and σ. methods: those with results.
    """
    config, spec, recipe = plan.config, plan.spec, plan.spec.recipe
    count, has_grid = len(spec.data.train), len(config.learning_rates) > 1
    yield (
        f"All fine-tunes use the same {count} training images, {recipe.epochs} epochs, batches of {recipe.batch_size}, crops of "
        f"{recipe.crop} pixels, SGD with momentum {recipe.momentum:g} and a {recipe.schedule} learning rate."
    )
    size = spec.network.input_size
    yield (
        "Frames are fed to the network at the size at which they arrive (model.input own-size)."
        if size is None
        else f"Frames of another size than {size[1]}x{size[0]} are scaled to it for every method (model.input training-size)."
    )
    if "original-scaled" in methods:
        yield (
            f"“{TITLES['original-scaled']}” is the original whose frames are scaled to the size of the training images first "
            "(model.input training-size), at levels whose frames have another one: it holds nothing, but computes as much as for "
            "undistorted frames."
        )
    if not spec.data.labelled:
        yield (
            "Scores are the agreement with the base's own answers to the undistorted images, because there are no labels: the "
            "base scores 100 where nothing is distorted, and its errors count as right."
        )
    if recipe.objective != "labels":
        how = {
            "both": f"beside the labels (weight {recipe.teacher_weight:g})",
            "teacher": "instead of labels, after running statistics that may move were re-estimated at the level",
        }
        yield (
            "All fine-tunes learn the base's own answers to the undistorted images, "
            f"{how[recipe.objective]}, at temperature {recipe.temperature:g}."
        )
    tuned = {method: rate for method, rate in rates.items() if not (plan.is_joint and method == "gearnn")}
    chosen = ", ".join(f"{TITLES[method]} {rate:g}" for method, rate in tuned.items())
    if has_grid:
        yield (
            f"Each method's learning rate was chosen once, at {tuning_level}, on the last {tuning_images(count)} training images "
            f"after a fine-tune without them: {chosen}. The base was trained on those images, and GearNN's layers were selected "
            "on all images; random layers were tuned with their first draw."
        )
    else:
        yield f"All methods use one learning rate, which was not tuned: {rates['switching']:g}."
    if plan.is_joint:
        unequal = " One level's adaptor may have more floats than an equal part of the memory, which is the baselines' budget."
        yield (
            f"GearNN's adaptors are the release's own, made at {recipe.learning_rate:g}; its layers were selected for all "
            f"levels together ({spec.coupling.problem})." + (unequal if spec.coupling.problem == "one-memory" else "")
        )
    formats = spec.criterion.storage_formats
    if formats != PAPERS.storage_formats:
        yield (
            f"GearNN's layers are stored as {', '.join(formats)}. The tables count floats of four bytes, so they count fewer "
            "floats than an adaptor restores. GearNN's learning rate is tuned with the same layers as float32."
        )
    if "gearnn-released" in methods:
        yield (
            f"The release was made at the learning rate {recipe.learning_rate:g}. Where its adaptors differ from those made here "
            "(another learning rate, several workers per level, another kind of processor), the tables list them as "
            f"“{TITLES['gearnn-released']}”."
        )
    asked = set(config.methods)
    if "mixed" in asked:
        yield (
            "Mixed training is one network for all levels of all axes, trained for as many steps as one fine-tune. Frames of "
            "different sizes cannot share a batch, so a batch has one size and mixes the levels of this size."
        )
    if "stability" in asked and stability is not None:
        alpha, sigma = stability
        yield (
            "Stability training computes two copies of every image, at twice the cost. The tables show the setting of its grid "
            f"with the best average accuracy on the validation images (α = {alpha:g}, σ = {sigma:g}), which favours this method."
            + (" Its learning rate was chosen in the middle of the grid." if has_grid else "")
        )
    if not spec.task.has_stability:
        yield (
            "Stability training is left out: it needs the distance of two outputs, and two answers of "
            f"{spec.task.name} have no common form."
        )
    if "bn-statistics" in asked:
        yield (
            "AdaBN re-estimates running mean and variance over one epoch's batches of the level's images, cropped as in "
            "training, without their labels."
        )
    if "first-block" in asked:
        yield "Surgical first block: the layers nearest to the input, up to the first that does not fit into M."
    if "auto-rgn" in asked:
        yield (
            "Auto-RGN computes relative gradients once, at the base. Eq. (2) selects layers by them under M, and each layer is "
            "trained at the learning rate times its share of the largest RGN. A batch normalisation's statistics are selected "
            "with its weight."
        )
    if "random" in asked:
        yield f"Random layers: {config.draws} draws; layers are taken in a random order wherever they still fit into M."
    if plan.untrained:
        yield (
            "Interpolated adaptors are linear mixtures of the two neighbours', by JPEG quality or CRF, or by the logarithm of "
            "brightness or frame area, as in serving. The nearest adaptor is the lower neighbour's if both are equally near."
        )
        yield (
            "Adaptors mixed by entropy have a share of their own for each image, by how certain the two neighbours' networks are "
            f"of it (Oh et al. 2025), in steps of 1/{STEPS}: as in serving, but not smoothed over a stream."
        )
    yield (
        "Intervals come from a paired bootstrap over the validation images. Consecutive frames of a clip resemble each other, so "
        "the intervals are too narrow where images come from few clips. They do not include the spread over seeds."
    )
