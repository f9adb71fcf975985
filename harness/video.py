"""Videos of episodes, where the machine can render."""

from pathlib import Path

import numpy as np

from harness.errors import RunError


class Video:
    """An mp4 of what an environment shows; `fps` frames are a second of it."""

    def __init__(self, path: Path, fps: int):
        import imageio  # only here: training needs no video

        path.parent.mkdir(exist_ok=True, parents=True)
        self.writer = imageio.get_writer(path, fps=fps, macro_block_size=1)
        self.shape = None  # of the images so far

    def film(self, env):
        """Adds what the environment shows now."""
        try:
            image = env.render()
        except Exception as error:  # whatever the graphics libraries raise
            reason = f"can't render ({type(error).__name__}: {error})"
            hint = "MuJoCo needs libegl1 or libosmesa6, and MUJOCO_GL=egl or =osmesa"
            raise RunError(f"{reason}; {hint}") from None
        image = np.asarray(image)
        colours = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3, 4))
        same = image.shape == (self.shape or image.shape)
        if not (colours and same and image.dtype == np.uint8):
            wanted = "an image (height, width, 3) of uint8, always of one size"
            came = f"an array of shape {image.shape} of {image.dtype}"
            raise RunError(f"can't film: its render must return {wanted}, not {came}")
        self.shape = image.shape
        height, width = image.shape[:2]
        # H.264 takes even numbers of pixels
        self.writer.append_data(image[: height // 2 * 2, : width // 2 * 2])

    def close(self):
        self.writer.close()
