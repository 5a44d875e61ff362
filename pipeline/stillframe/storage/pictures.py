"""Read single images and masks from image files, npy or Zarr."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr.errors

from stillframe.images.arrays import boolean
from stillframe.storage.zarr_files import refuse_encoded
from stillframe.wording import first_line


def load_image(path: str | Path, names: tuple[str, ...] = ("image", "reference")) -> npt.NDArray[Any]:
    """Return an image (y, x) from npy, tif, any image file, a Zarr array, or the first of some names in a group."""
    file = Path(path).expanduser()
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist. Check the path.")
    try:
        image = np.asarray(_read_image(file, names))
    except Exception as error:
        raise ValueError(
            f"{file} cannot be read as an image ({first_line(error)}). Give npy, tif, png or a Zarr array (y, x)."
        ) from error
    if image.ndim != 2:
        raise ValueError(f"{file} has shape {image.shape}, but one picture (y, x) is needed. Save a single channel.")
    return image


def _read_image(file: Path, names: tuple[str, ...]) -> Any:
    if file.is_dir():
        node: Any = zarr.open(file, mode="r")
        array = node if isinstance(node, zarr.Array) else next(node[name] for name in names if name in node)
        refuse_encoded(array, file)
        return array[:]
    if file.suffix.lower() == ".npy":
        return np.load(file, allow_pickle=False)
    if file.suffix.lower() in (".tif", ".tiff"):
        import tifffile

        return tifffile.imread(file)
    from PIL import Image

    with Image.open(file) as picture:
        # Pixels of a palette image are indices into a table of colours, and must not be compared as brightness.
        return np.asarray(picture.convert("L") if picture.mode == "P" else picture)


def load_mask(path: str | Path) -> npt.NDArray[np.bool_]:
    """Return a mask (y, x), True = valid, from npy, tif, png or Zarr.

    Parameters
    ----------
    path : str or Path
        An image of booleans, 0/1 or 0/255; or a Zarr group with an array "mask".

    Returns
    -------
    ndarray of bool, shape (y, x)
        True where the stored value is not 0. Invert it with ``~`` if your file marks the invalid pixels.

    Raises
    ------
    FileNotFoundError
        The path does not exist.
    ValueError
        The file is no image (y, x), has more than two different values, or is False everywhere.

    Examples
    --------
    >>> import numpy as np, tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "mask.npy"
    >>> np.save(file, np.array([[0, 255], [255, 255]], dtype=np.uint8))
    >>> load_mask(file)
    array([[False,  True],
           [ True,  True]])
    """
    mask = boolean(load_image(path, ("mask",)), f"{path}")
    if not mask.any():
        raise ValueError(f"{path} is False everywhere: no pixel is left to compare. True means valid; invert it?")
    return mask
