"""What is measured of every trial."""

from dataclasses import dataclass
from pathlib import Path

from alphaquant.specs.check import Natural, Positive, check


@dataclass(frozen=True, kw_only=True)
class ScoreSpec:
    """What the study optimizes, and what it reports besides."""

    objectives: str = "bits,kl"
    """What the study optimizes: bits,kl, then any of perplexity, same_top, drift,
    expert_overlap, utilization, load_entropy, starved_experts, active_bytes, latency, or tasks of
    lm-eval."""
    also: str = ""
    """Scores of the same names that every trial measures and only reports."""
    latency_table: Path | None = None
    """Measured times, CSV or JSON lines; needed for latency."""
    task_data: Path | None = None
    """Folder of MMLU's files dev/SUBJECT_dev.csv and test/SUBJECT_test.csv; default: the Hugging
    Face hub."""
    shots: Natural | None = None
    """Examples before each question (lm-eval); default: the task's own."""
    task_limit: Positive = 20
    """Only the first so many documents of each task of lm-eval."""

    def __post_init__(self) -> None:
        """Refuse wrong types and counts that make no sense.

        Raises:
            ConfigError: naming the field.
        """
        check(self)
