"""Where the project's own files lie: its configuration, its models and its data."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
