"""Videos of episodes, where the machine can render."""

from pathlib import Path

from harness.errors import RunError


class Video:
    """An mp4 of what an environment shows; `fps` frames are a second of it."""

    def __init__(self, path: Path, fps: int):
        import imageio  # only here: training needs no video

        path.parent.mkdir(exist_ok=True, parents=True)
        self.writer = imageio.get_writer(path, fps=fps, macro_block_size=1)

    def film(self, env):
        """Adds what the environment shows now."""
        try:
            image = env.render()
        except Exception as error:  # whatever the graphics libraries raise
            reason = f"can't render ({type(error).__name__}: {error})"
            hint = "install libegl1 or libosmesa6 and set MUJOCO_GL=egl or =osmesa"
            raise RunError(f"{reason}; {hint}") from None
        self.writer.append_data(image)

    def close(self):
        self.writer.close()
