"""Names of jobs' folders: made of a command's overrides, so that the same run always lands in the same folder.

A name is readable wherever no other overrides can have it. Where characters are dropped, where it is too long for a
file system, or where a value reads like another override, a digest of the overrides makes it unique.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

MAX_BYTES = 180
"""File systems allow 255 bytes a name; a digest and the suffixes of lock and temporary files need some of them."""
UNNAMED = frozenset(
    {"study", "resume", "overwrite", "threads", "workers", "logger", "profiler"}
    | {f"trainer.{key}" for key in ("num_nodes", "workers", "detect_anomaly")}
)
"""Keys that do not make another job."""
_DROPPED = re.compile(r"[^\w.-]+")
"""No `=` and no `,` stays: the path must be a plain value on a later command line (`adapter=outputs/...`)."""
_ONE_FOLDER = re.compile(r"[^/\\\x00-\x1f\x7f]+")
_LIKE_ANOTHER = re.compile(r"_.*-")
"""In a value: the name `a-x_b-y` could mean a=x_b-y, or a=x and b=y."""


def override_key(word: str) -> str:
    """The key of an override: `selector.budget` of `++selector.budget=80`."""
    return word.partition("=")[0].lstrip("+~")


def job_name(command: str, overrides: Sequence[str], study: str | Path | None = None) -> str:
    """The folder's name for a command and its overrides.

    Args:
        study: the study's folder. A folder in it that was named before names had digests, and that holds the job of
            just these overrides, keeps its name.
    """
    named = _named(overrides)
    joined = "_".join(named).replace("=", "-")
    readable = _DROPPED.sub("-", joined).strip("-.") or "defaults"
    name = f"{command}_{readable}"
    whole = "_".join(word.replace("=", "-", 1) for word in named) in ("", readable)
    if whole and len(name.encode()) <= MAX_BYTES and not any(map(_reads_like_another, named)):
        return name
    before = name if len(name) <= MAX_BYTES else f"{name[:MAX_BYTES]}-{_digest(joined)}"
    if study is not None and _holds(Path(study) / before, named):
        return before
    return f"{name.encode()[:MAX_BYTES].decode(errors='ignore')}-{_digest(chr(0).join(named))}"


def merged_name(parts: Sequence[str], overrides: Sequence[str], study: Path) -> str:
    """The folder of the job that shards make together; never that of one of the shards.

    Args:
        parts: names of the shards' folders.
        overrides: those of any shard.
    """
    common = [word for word in overrides if override_key(word) != "shard"]
    name = job_name("eval", common, study)
    return name if name not in parts else job_name("eval", [*common, "shard=all"], study)


def study_folder(study: str) -> str:
    """The folder of a study in outputs/.

    Raises:
        ValueError: the name is not that of one folder.
    """
    if not _ONE_FOLDER.fullmatch(study) or not study.strip(" .") or study[0] == "." or len(study.encode()) > MAX_BYTES:
        raise ValueError(
            f"study={study[:80]}: a study is a folder in outputs/; give a name of at most {MAX_BYTES} bytes without "
            "slashes, control characters and a dot at its beginning"
        )
    return f"outputs/{study}"


def _named(overrides: Sequence[str]) -> list[str]:
    return sorted(str(word) for word in overrides if override_key(str(word)) not in UNNAMED)


def _reads_like_another(word: str) -> bool:
    return _LIKE_ANOTHER.search(word.partition("=")[2]) is not None


def _holds(folder: Path, named: Sequence[str]) -> bool:
    """Whether the folder has the record of a job with these overrides."""
    try:
        return _named(json.loads((folder / "result.json").read_bytes())["overrides"]) == named
    except (OSError, ValueError, KeyError, TypeError):  # no such folder, or no record: nothing to keep
        return False


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
