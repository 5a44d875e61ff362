"""Version numbers of the package, of its results and of the formats it writes."""

from typing import Final

__version__ = "0.1.0"
"""Version of the package."""
KERNEL_VERSION = 11
"""Version of the numbers: raised whenever equal frames and settings would give other results."""
SETTINGS_VERSION: Final = 1
"""Version of settings in TOML files."""
STORE_VERSION = 1
"""Version of the Zarr stores: arrays, units and attributes."""
RUN_VERSION: Final = 3
"""Version of ``run.json``, unit records and manifest; 1 and 2 were never released."""
