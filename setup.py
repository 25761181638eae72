"""What pyproject.toml cannot say: the wheel holds a checkout's `config/` and demo rows as `squeeze/shipped/`."""

from setuptools import find_packages, setup

SHIPPED = {
    "squeeze.shipped.config": "config",
    "squeeze.shipped.config.calibration": "config/calibration",
    "squeeze.shipped.config.shapes": "config/shapes",
    "squeeze.shipped.data.longbench": "data/longbench",
}

setup(
    packages=[*find_packages(include=["squeeze", "squeeze.*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={"squeeze.report": ["*.j2"], **{name: ["*.json", "*.jsonl"] for name in SHIPPED}},
)
