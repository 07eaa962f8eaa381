"""The world of shapes: images and videos of one coloured shape, their prompts, and oracles that read them.

    an image:  "a small red circle on a white background"
    a video:   "a small red circle moving left on a white background"

A prompt may leave any attribute out ("a red shape", "a red shape moving"), and the missing one is then
*uniform* over its values. So what a perfect model does with every prompt is known exactly, and prompt
accuracy, mode coverage and spread are numbers, not opinions.

A scene is a pair (attributes, centre). `attributes` is {name: int [n]}, indices into the values of
ATTRIBUTES or VIDEO; `centre` is float [n, 2], (x, y) in pixels, of a video in its middle frame.

    python tiny/shapes.py --prompts prompts      # writes this project's prompt lists: three of each kind
"""

import argparse
import itertools
import os

import numpy as np

SIDE = 32  # pixels
FRAMES = 9  # of a video
MIDDLE = FRAMES // 2
ATTRIBUTES = {
    "size": ("small", "large"),
    "colour": ("red", "green", "blue", "yellow", "purple", "cyan"),
    "shape": ("circle", "square", "triangle"),
    "background": ("black", "grey", "white"),
}
VIDEO = ATTRIBUTES | {"motion": ("left", "right", "up", "down")}
STEPS = np.array([(-1.0, 0), (1, 0), (0, -1), (0, 1)])  # of a motion, (x, y) in pixels a frame
RED, GREEN, BLUE = (220, 40, 40), (40, 170, 60), (50, 70, 230)
YELLOW, PURPLE, CYAN = (240, 215, 50), (165, 50, 200), (60, 205, 225)
BLACK, GREY, WHITE = (20, 20, 20), (128, 128, 128), (238, 238, 238)
COLOURS = np.array([RED, GREEN, BLUE, YELLOW, PURPLE, CYAN]) / 127.5 - 1
BACKGROUNDS = np.array([BLACK, GREY, WHITE]) / 127.5 - 1
# of the circle, in pixels; squares and triangles have the circle's area, so area says nothing of the shape
RADII = (5.0, 8.0)
CENTRES = (10.0, 22.0)  # each coordinate of the centre lies between these, in pixels and in every frame
DROP = 0.3  # probability that a prompt leaves an attribute out


# ----------------------------------------------------------------------------------------------------------
# Images and videos
# ----------------------------------------------------------------------------------------------------------


def render_masks(shape, size, centre):
    """n shapes, shape and size int [n], centre [n, 2] -> antialiased coverage [n, SIDE, SIDE] in [0, 1]."""
    axis = np.arange(SIDE) + 0.5
    x = axis - centre[:, 0, None, None]
    y = axis[:, None] - centre[:, 1, None, None]
    radius = np.array(RADII)[size][:, None, None]
    half_side = radius * np.sqrt(np.pi) / 2
    inradius = radius * np.sqrt(np.pi / (3 * np.sqrt(3)))

    # signed distances from the outline, in pixels
    circle = np.hypot(x, y) - radius
    square = np.maximum(np.abs(x), np.abs(y)) - half_side
    upper_edges = np.abs(x) * np.sqrt(3) / 2 - y / 2  # of a triangle that points up
    triangle = np.maximum(y, upper_edges) - inradius
    chosen = np.asarray(shape)[:, None, None]
    distance = np.choose(chosen, (circle, square, triangle))
    return np.clip(0.5 - distance, 0, 1)


def render(attributes, centre):
    """Scenes -> float32 images [n, 3, SIDE, SIDE] in [-1, 1]."""
    alpha = render_masks(attributes["shape"], attributes["size"], centre)[:, None]
    colour = COLOURS[attributes["colour"]][:, :, None, None]
    background = BACKGROUNDS[attributes["background"]][:, :, None, None]
    images = alpha * colour + (1 - alpha) * background
    return images.astype(np.float32)


def trace_path(attributes, centre):
    """Scenes with a motion -> the centres of their frames [n, FRAMES, 2]."""
    step = STEPS[attributes["motion"]][:, None]
    time = np.arange(FRAMES) - MIDDLE
    return centre[:, None] + step * time[:, None]


def render_video(attributes, centre):
    """Scenes with a motion -> float32 videos [n, 3, FRAMES, SIDE, SIDE] in [-1, 1]."""
    centres = trace_path(attributes, centre).reshape(-1, 2)
    attributes = {name: np.repeat(values, FRAMES) for name, values in attributes.items()}
    frames = render(attributes, centres)
    return frames.reshape(-1, FRAMES, 3, SIDE, SIDE).swapaxes(1, 2)


def draw(rng, n, world=ATTRIBUTES):
    """n random scenes (attributes, centre), all uniform; `world` is ATTRIBUTES or VIDEO."""
    attributes = {}
    for name, values in world.items():
        attributes[name] = rng.integers(len(values), size=n)
    lowest = np.full((n, 2), CENTRES[0])
    highest = np.full((n, 2), CENTRES[1])
    if "motion" in world:
        travel = np.abs(STEPS[attributes["motion"]]) * MIDDLE
        lowest += travel
        highest -= travel
    return attributes, rng.uniform(lowest, highest)


# ----------------------------------------------------------------------------------------------------------
# Prompts
# ----------------------------------------------------------------------------------------------------------


def describe(attributes):
    """{name: value or None} of one image or video -> its prompt; None leaves the attribute out."""
    words = ["a", attributes["size"], attributes["colour"], attributes["shape"] or "shape"]
    if "motion" in attributes:
        words += ["moving", attributes["motion"]]
    if attributes["background"]:
        words += ["on", "a", attributes["background"], "background"]
    return " ".join(word for word in words if word)


def parse(prompt):
    """Prompt -> {name: index or None}, the inverse of `describe`.

    A motion is among the names if the prompt says "moving". ValueError where the prompt is not of this world.
    """
    words = prompt.split()
    world = VIDEO if "moving" in words else ATTRIBUTES
    known = {}
    for name, values in world.items():
        for i, value in enumerate(values):
            known[value] = (name, i)

    attributes = dict.fromkeys(world)
    for word in words:
        if word in known:
            name, i = known[word]
            if attributes[name] is not None:
                raise ValueError(f"the prompt {prompt!r} has two values of {name}")
            attributes[name] = i
        elif word not in ("a", "shape", "moving", "on", "background"):
            unknown = f"the word {word!r}, which the world of shapes does not know"
            raise ValueError(f"the prompt {prompt!r} has {unknown}")
    return attributes


def draw_prompts(attributes, rng):
    """attributes {name: int [n]} -> n prompts, each attribute left out with probability DROP."""
    n = len(attributes["shape"])
    kept = {name: rng.random(n) >= DROP for name in attributes}
    prompts = []
    for i in range(n):
        told = dict.fromkeys(attributes)
        for name, values in attributes.items():
            if kept[name][i]:
                told[name] = VIDEO[name][values[i]]
        prompts.append(describe(told))
    return prompts


# ----------------------------------------------------------------------------------------------------------
# Oracles
# ----------------------------------------------------------------------------------------------------------


class Oracle:
    """Reads every attribute of an image by matching it with clean templates. Plain arrays, no learning.

    An image is *valid* if it really shows one shape: its background and colour are near known ones and the
    residual of the best template is small. The thresholds are far from both clean renders (0.01) and images
    of nothing (above 0.5).
    """

    max_colour_error = 0.45  # Euclidean, RGB in [-1, 1]; the nearest two colours are 1.0 apart
    max_residual = 0.20  # squared error of the coverage over the template's own energy
    spacing = 0.5  # of the templates' centres, in pixels

    def __init__(self):
        axis = np.arange(CENTRES[0] - 2, CENTRES[1] + 2 + self.spacing, self.spacing)
        grid = np.meshgrid(range(3), range(2), axis, axis, indexing="ij")
        self.shape, self.size, x, y = (values.ravel() for values in grid)
        self.centre = np.stack([x, y], 1)
        masks = render_masks(self.shape, self.size, self.centre)
        self.templates = masks.reshape(len(masks), -1).astype(np.float32)
        self.energy = (self.templates**2).sum(1)

    def read(self, images):
        """Images [n, 3, SIDE, SIDE] in [-1, 1] -> what they show, {name: [n]}.

        "size", "colour", "shape" and "background" are int, "x" and "y" float in pixels, "residual" is float,
        "valid" bool. ValueError for images of another shape.
        """
        images = np.asarray(images, np.float32)
        if images.ndim != 4 or images.shape[1:] != (3, SIDE, SIDE):
            wanted = f"[n, 3, {SIDE}, {SIDE}]"
            raise ValueError(f"the oracle reads pictures of shape {wanted}, not {list(images.shape)}")
        parts = []
        for start in range(0, len(images), 512):
            parts.append(self._read(images[start : start + 512]))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _read(self, images):
        n = len(images)
        pixels = images.reshape(n, 3, -1)

        border = np.ones((SIDE, SIDE), bool)
        border[2:-2, 2:-2] = False
        outer_colour = np.median(images[:, :, border], axis=2)
        background, background_error = find_nearest(outer_colour, BACKGROUNDS)
        ground = BACKGROUNDS[background][:, :, None]

        difference = np.linalg.norm(pixels - ground, axis=1)
        inside = np.argsort(-difference, axis=1)[:, :32]  # the small shape's interior has over 60 pixels
        inner_pixels = np.take_along_axis(pixels, inside[:, None], 2)
        inner_colour = np.median(inner_pixels, axis=2)
        colour, colour_error = find_nearest(inner_colour, COLOURS)

        direction = COLOURS[colour][:, :, None] - ground
        coverage = ((pixels - ground) * direction).sum(1) / (direction**2).sum(1)
        coverage = coverage.astype(np.float32)
        # |coverage - template|^2 for all templates at once; the term of the coverage alone does not change
        # which is best
        mismatch = self.energy - 2 * coverage @ self.templates.T
        best = mismatch.argmin(1)
        squared_error = (coverage**2).sum(1) + mismatch[np.arange(n), best]
        residual = squared_error / self.energy[best]

        colours_known = (background_error < self.max_colour_error) & (colour_error < self.max_colour_error)
        return {
            "size": self.size[best],
            "colour": colour,
            "shape": self.shape[best],
            "background": background,
            "x": self.centre[best, 0],
            "y": self.centre[best, 1],
            "residual": residual,
            "valid": colours_known & (residual < self.max_residual),
        }


class VideoOracle(Oracle):
    """Reads every frame of a video as an image: attributes by majority, the motion off the frames' centres.

    A video is *valid* if all its frames but at most one are valid images of the same attributes and their
    centres move as a motion of this world does: near a straight line, along an axis, at its speed.
    """

    max_speed_error = 0.3  # pixels a frame, Euclidean, of the fitted velocity; standing still is 1 away
    max_scatter = 1.5  # pixels between a frame's centre and the line, each coordinate

    def read(self, videos):
        """Videos [n, 3, FRAMES, SIDE, SIDE] in [-1, 1] -> as Oracle.read, and "motion": int [n].

        "x" and "y" are of the middle frame, "residual" is the mean over the frames. ValueError for videos of
        another shape.
        """
        videos = np.asarray(videos, np.float32)
        if videos.ndim != 5 or videos.shape[1:] != (3, FRAMES, SIDE, SIDE):
            wanted = f"[n, 3, {FRAMES}, {SIDE}, {SIDE}]"
            raise ValueError(f"the oracle reads videos of shape {wanted}, not {list(videos.shape)}")
        images = videos.swapaxes(1, 2).reshape(-1, 3, SIDE, SIDE)
        frames = {name: values.reshape(-1, FRAMES) for name, values in super().read(images).items()}

        read = {}
        good = frames["valid"]
        for name, values in ATTRIBUTES.items():
            votes = frames[name][..., None] == np.arange(len(values))
            read[name] = votes.sum(1).argmax(1)
            good = good & (frames[name] == read[name][:, None])

        time = np.arange(FRAMES)[:, None] - MIDDLE
        centre = np.stack([frames["x"], frames["y"]], 2)
        middle = centre.mean(1)
        velocity = (centre * time).sum(1) / (time**2).sum()  # least squares
        read["motion"], speed_error = find_nearest(velocity, STEPS)
        off_the_line = centre - middle[:, None] - velocity[:, None] * time
        good = good & (np.abs(off_the_line).max(2) < self.max_scatter)

        read["x"], read["y"] = middle.T
        read["residual"] = frames["residual"].mean(1)
        read["valid"] = (good.sum(1) >= FRAMES - 1) & (speed_error < self.max_speed_error)
        return read


def find_nearest(points, known):
    """points [n, d], known [k, d] -> index of the nearest [n], its distance [n]."""
    distance = np.linalg.norm(points[:, None] - known, axis=2)
    return distance.argmin(1), distance.min(1)


# ----------------------------------------------------------------------------------------------------------
# Prompt lists
# ----------------------------------------------------------------------------------------------------------


def list_prompts(world=ATTRIBUTES):
    """All prompts of a world, sorted."""
    choices = [(None, *values) for values in world.values()]
    prompts = [describe(dict(zip(world, chosen))) for chosen in itertools.product(*choices)]
    return sorted(prompts)


def draw_new_prompts(rng, count, world, known):
    """`count` different prompts that are not in `known`, drawn as they come up in the world."""
    drawn = []
    while len(drawn) < count:
        attributes, _ = draw(rng, 1, world)
        prompt = draw_prompts(attributes, rng)[0]
        if prompt not in known and prompt not in drawn:
            drawn.append(prompt)
    return drawn


def split_prompts(world=ATTRIBUTES, held_out=64, most=None, evaluation_seed=65):
    """Prompt lists (train, tune, evaluation), disjoint.

    tune and evaluation have `held_out` prompts each; train has all the others, or `most` of them. With the
    seed of its own the evaluation list is fair (see tests/test_shapes.py): every attribute is left open by at
    least 3 prompts in 16, and no value is named over 1.6 times as often as another.
    """
    rng = np.random.default_rng(0)
    evaluation_rng = np.random.default_rng(evaluation_seed)
    # an evaluation list once, but seen while settings were still chosen: its prompts are for training now
    seen = draw_new_prompts(rng, held_out, world, known=[])
    tune = draw_new_prompts(rng, held_out, world, known=seen)
    evaluation = draw_new_prompts(evaluation_rng, held_out, world, known=seen + tune)
    train = [prompt for prompt in list_prompts(world) if prompt not in tune + evaluation]
    if most:
        chosen = rng.choice(len(train), most, replace=False)
        train = [train[i] for i in sorted(chosen)]
    return train, tune, evaluation


def split_motion_prompts():
    """The same of videos: 320, 32 and 32 of the 1680 prompts."""
    return split_prompts(VIDEO, held_out=32, most=320, evaluation_seed=2878)


def main():
    parser = argparse.ArgumentParser(description="write the prompt lists of the world of shapes")
    parser.add_argument(
        "--prompts", default="prompts", help="folder for {shapes,motion}_{train,tune,eval}.txt"
    )
    folder = parser.parse_args().prompts
    os.makedirs(folder, exist_ok=True)
    for kind, lists in (("shapes", split_prompts()), ("motion", split_motion_prompts())):
        for name, prompts in zip(("train", "tune", "eval"), lists):
            with open(os.path.join(folder, f"{kind}_{name}.txt"), "w") as file:
                file.write("\n".join(prompts) + "\n")


if __name__ == "__main__":
    main()
