"""Install the policy "greenest", an example of a plugin for daskfed."""

from __future__ import annotations

from setuptools import setup

setup(
    name="daskfed-policy-greenest",
    version="0.1.0",
    description="A placement policy for daskfed: of the sites that are fast enough, the one with the least carbon",
    license="BSD-3-Clause",
    python_requires=">=3.11",
    packages=["daskfed_policy_greenest"],
    package_data={"daskfed_policy_greenest": ["py.typed"]},
    install_requires=["daskfed", "dask"],
    entry_points={"daskfed.policies": ["greenest=daskfed_policy_greenest:Greenest"]},
    zip_safe=False,
)
