"""Peak memory of loading: plain, encoded while loading, and from an encoded checkpoint, each in a separate process.

    python benchmarks/load_memory.py [CHECKPOINT]

Without an argument, it creates a random Llama of about 0.5B parameters. "peak" is the largest anonymous resident memory
(RssAnon of /proc/self/status, sampled every millisecond) above what the process held before loading, "after" the same
after loading. Tensors that are used unchanged stay mapped from the checkpoint file: they are not anonymous memory, and
count only in "weights". Mapped weights are read when they are first used: "first answer" is the time until the logits
of one token are available, "cold" the same when the files were not in memory beforehand. Linux only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from arctic_plugins_huggingface.checkpoints.save import save_checkpoint

from arctic_plugins import Stack


def rss_anon() -> int:
    """Anonymous resident bytes of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status: this benchmark needs Linux")


class Peak:
    """Samples :func:`rss_anon` in a thread for the time of a ``with`` block."""

    def __enter__(self) -> Peak:
        self.before = self.highest = rss_anon()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.after = rss_anon()
        self.highest = max(self.highest, self.after)

    def _sample(self) -> None:
        while not self._done.is_set():
            self.highest = max(self.highest, rss_anon())
            time.sleep(0.001)


def measure(checkpoint: str, plugins: str) -> dict[str, float]:
    """Load once; sizes in MB, time in seconds."""
    import torch
    from arctic_plugins_huggingface import load_model

    stack = Stack.from_dict(json.loads(plugins))
    torch.nn.Linear(8, 8)(torch.zeros(1, 8))  # start torch's threads before the first sample
    started = time.perf_counter()
    with Peak() as peak:
        model, _ = load_model(checkpoint, stack, dtype=torch.bfloat16)
    seconds = time.perf_counter() - started
    with torch.inference_mode():
        model(input_ids=torch.tensor([[1]]))
    answered = time.perf_counter() - started
    tensors = [*model.parameters(), *model.buffers()]
    largest = max(parameter.numel() for parameter in model.parameters()) * 2
    return {
        "weights": sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values()) / 1e6,
        "after": (peak.after - peak.before) / 1e6,
        "peak": (peak.highest - peak.before) / 1e6,
        "largest": largest / 1e6,
        "seconds": seconds,
        "answered": answered,
    }


def forget(checkpoint: Path) -> None:
    """Drop a checkpoint's files from the page cache."""
    for path in checkpoint.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Measure every way of loading, three times each, and print the medians as a table."""
    if len(sys.argv) == 4:
        print(json.dumps(measure(sys.argv[2], sys.argv[3])))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if len(sys.argv) == 2:
            checkpoint = Path(sys.argv[1])
        else:
            from arctic_plugins.testing import tiny_llama

            checkpoint = tiny_llama(
                folder / "plain",
                dtype="bfloat16",
                hidden_size=1536,
                intermediate_size=6144,
                num_hidden_layers=12,
                num_attention_heads=12,
                num_key_value_heads=4,
                head_dim=128,
                vocab_size=32000,
            )
        from arctic_plugins_huggingface import load_model

        stack = Stack.from_dict({"fp8": {}})
        save_checkpoint(*load_model(checkpoint, stack), folder / "encoded", stack)
        columns = (
            "load",
            "weights MB",
            "after MB",
            "peak MB",
            "peak - after MB",
            "largest tensor in bf16 MB",
            "seconds",
            "with first answer",
            "cold",
        )
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for label, source, plugins in (
            ("plain bf16", checkpoint, "{}"),
            ("fp8 while loading", checkpoint, '{"fp8": {}}'),
            ("fp8 checkpoint", folder / "encoded", "{}"),
        ):
            runs, cold = [], []
            for times in (runs, cold, runs, cold, runs, cold):
                if times is cold:
                    forget(source)
                done = subprocess.run(
                    [sys.executable, __file__, "--child", str(source), plugins],
                    capture_output=True,
                    text=True,
                    check=True,
                )
                times.append(json.loads(done.stdout.splitlines()[-1]))
            slow = sorted(run["answered"] for run in cold)[1]
            middle = {key: sorted(run[key] for run in runs)[1] for key in runs[0]}
            extra = middle["peak"] - middle["after"]
            sizes = " | ".join(f"{middle[key]:.0f}" for key in ("weights", "after", "peak"))
            print(
                f"| {label} | {sizes} | {extra:.0f} | {middle['largest']:.0f} | {middle['seconds']:.2f} | "
                f"{middle['answered']:.2f} | {slow:.2f} |"
            )


if __name__ == "__main__":
    main()
