"""Write the diagrams of the documentation, as SVG next to this file: ``python docs/diagrams/draw.py``.

They are narrow, so that they can be read on a phone, and have a background of their own, so that they can be read on
any page. Lengths are in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

WIDTH = 440
MARGIN = 16
GAP = 34
"""Between two boxes, for an arrow and its label."""
LINE = 18

STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: #1f2328 }
  .title { font-weight: 600; font-size: 14px }
  .mono { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 13px; font-weight: 600 }
  .small { font-size: 12px; fill: #57606a }
  .page { fill: #ffffff; stroke: #d0d7de }
  .step { fill: #f3f5f7; stroke: #b6bec7 }
  .data { fill: #ddeeff; stroke: #7fb2e5 }
  .part { fill: #fdeedb; stroke: #e0ad6b }
  .arrow { stroke: #57606a; stroke-width: 1.5; fill: none }
  .head { fill: #57606a }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .small { fill: #a5afba }
    .page { fill: #16191d; stroke: #3d444d }
    .step { fill: #262c33; stroke: #57606a }
    .data { fill: #12304f; stroke: #3b75ad }
    .part { fill: #47310f; stroke: #96703a }
    .arrow { stroke: #a5afba }
    .head { fill: #a5afba }
  }
"""


class Drawing:
    """Boxes and arrows, from top to bottom."""

    def __init__(self, title: str) -> None:
        self.title, self.y, self.shapes = title, MARGIN, list[str]()

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        self.shapes.append(f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>')

    def row(self, *boxes: tuple[str, str, str, list[str]]) -> None:
        """Draw boxes of equal width next to each other: kind, title, a note to the right of it, and lines of text."""
        width = (WIDTH - MARGIN * (len(boxes) + 1)) / len(boxes)
        height = 32 + LINE * max(len(lines) for *_, lines in boxes)
        for number, (kind, title, note, lines) in enumerate(boxes):
            x = MARGIN + number * (width + MARGIN)
            self.shapes.append(
                f'<rect x="{x:g}" y="{self.y}" width="{width:g}" height="{height}" rx="6" class="{kind}"/>'
            )
            self.text(x + 10, self.y + 21, title.strip("`"), "mono" if "`" in title else "title")
            self.text(x + width - 10, self.y + 21, note, "small", "end")
            for at, line in enumerate(lines, 1):
                self.text(x + 10, self.y + 21 + LINE * at, line)
        self.y += height

    def arrows(self, *labels: str) -> None:
        """Draw an arrow to the next row for each label, which stands to the right of it."""
        width = WIDTH / len(labels)
        for number, label in enumerate(labels):
            x = number * width + MARGIN + 30
            end = self.y + GAP - 3
            self.shapes.append(f'<path d="M{x:g} {self.y + 3}V{end - 5}" class="arrow"/>')
            self.shapes.append(f'<path d="M{x - 4:g} {end - 7}h8l-4 7z" class="head"/>')
            self.text(x + 10, self.y + GAP / 2 + 4, label, "small")
        self.y += GAP

    def heading(self, *texts: str) -> None:
        """Write a heading over each column."""
        for number, text in enumerate(texts):
            self.text(MARGIN + number * (WIDTH - MARGIN) / len(texts), self.y + 14, text, "title")
        self.y += 24

    def svg(self) -> str:
        height = self.y + MARGIN
        size = f'width="{WIDTH}" height="{height}"'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size} viewBox="0 0 {WIDTH} {height}">',
                f"<title>{escape(self.title)}</title>",
                f"<style>{STYLE}</style>",
                f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8" class="page"/>',
                *self.shapes,
                "</svg>\n",
            ]
        )


def data_flow() -> Drawing:
    """From a safetensors file to a served token."""
    drawing = Drawing("From a safetensors file to a served token")
    drawing.row(("data", "recipe.yaml, or a dict", "", []), ("data", "A checkpoint", "", []))
    drawing.arrows("", "")
    drawing.row(
        ("step", "`Stack.from_dict`", "", ["plugins are found,", "configured and ordered"]),
        ("step", "`files/`", "", ["sizes, keys and digests", "are checked"]),
    )
    drawing.arrows("", "")
    drawing.row(
        (
            "step",
            "`plan_model`",
            "loading/",
            ["hooks: hf_configure_model, validate, claim;", "no weight has been read yet"],
        )
    )
    drawing.arrows("ModelPlan; arctic train --dry-run prints it")
    drawing.row(("step", "`load_model`", "loading/", ["one tensor at a time: Codec.encode, Placement.hold"]))
    drawing.arrows("FrozenLinear, FrozenExperts")
    drawing.row(("step", "`hf_transform_model`", "adapters/", ["PEFT's layers go over frozen modules"]))
    drawing.arrows("")
    drawing.row(
        ("step", "`attach(Trainer(...), stack)`", "training/", ["adapters are trained; the bytes do not change"])
    )
    drawing.arrows("")
    drawing.row(
        (
            "step",
            "`save_checkpoint`",
            "checkpoints/",
            ["and arctic merge: the same bytes, in safetensors;", "arctic_plugins.json is written last"],
        )
    )
    drawing.arrows("")
    drawing.row(("data", "A checkpoint", "", ["config.json has quantization_config: arctic"]))
    drawing.arrows("")
    drawing.row(("step", "vLLM's workers", "arctic_plugins_vllm", ["the method arctic gives each layer its codec"]))
    drawing.arrows("Codec.linear: the same kernels, on the same bytes")
    drawing.row(("data", "A token", "", []))
    return drawing


def training_step() -> Drawing:
    """A frozen layer in forward and in backward."""
    drawing = Drawing("A training step through a frozen layer")
    drawing.row(
        (
            "data",
            "Encoded bytes",
            "Placement",
            ["in the module, in host memory, on disk,", "or spread over processes"],
        )
    )
    drawing.arrows("bytes", "bytes, again")
    drawing.heading("Forward", "Backward")
    drawing.row(
        ("step", "`lease`", "Handle", ["fetched, unless they", "already are"]),
        ("step", "`lease`", "Handle", ["an error if the weight", "has changed since"]),
    )
    drawing.arrows("", "")
    drawing.row(
        ("part", "`decode`", "Codec", ["to scratch memory, or", "fused with the product"]),
        ("part", "`decode`", "Codec", ["to scratch memory, or", "fused with the product"]),
    )
    drawing.arrows("", "")
    drawing.row(
        ("part", "`linear`", "Codec", ["y = x Wᵀ"]),
        ("part", "`grad_input`", "Codec", ["grad x = grad y W"]),
    )
    drawing.arrows("", "")
    drawing.row(
        ("step", "release", "Handle", ["the bytes may go;", "nothing is kept"]),
        ("step", "release", "Handle", ["the bytes may go"]),
    )
    drawing.arrows("", "")
    drawing.row(
        ("step", "Adapter", "PEFT", ["y + s B A x"]),
        ("step", "Adapter", "PEFT", ["grad A, grad B"]),
    )
    drawing.arrows("", "")
    drawing.row(("data", "The optimizer", "", ["changes the adapters, and never the bytes"]))
    return drawing


def stack() -> Drawing:
    """Plugins, slots, stack and hosts."""
    drawing = Drawing("Plugins, slots, stack and hosts")
    drawing.heading("Plugins, and the slots that they fill")
    drawing.row(
        ("part", "`fp8`", "or bnb", ["weight_codec:", "one for each module"]),
        ("part", "`offload`", "and shard", ["placement:", "several, in order"]),
    )
    drawing.y += 10
    drawing.row(
        ("part", "`lora`", "", ["adapter:", "several"]),
        ("part", "`moe`", "", ["experts_dispatch:", "one for each module"]),
    )
    drawing.y += 10
    drawing.row(
        ("part", "`rope`", "", ["rope:", "one for the model"]),
        ("part", "`longseq`", "", ["loss and attention:", "one for the model"]),
    )
    drawing.arrows("a recipe, or a dict, enables some of them")
    drawing.row(
        (
            "step",
            "`Stack`",
            "resolver",
            [
                "requirements, conflicts, slots, order, host versions;",
                "two values for one thing are an error naming both",
            ],
        )
    )
    drawing.arrows("hooks, in its order", "hooks, in its order")
    drawing.row(
        (
            "step",
            "transformers",
            "",
            ["hf_configure_model", "hf_transform_model", "hf_training_arguments", "hf_attach_trainer"],
        ),
        ("step", "vLLM", "", ["register, in each worker", "vllm_engine_args", "", "needs no recipe"]),
    )
    drawing.arrows("writes", "reads")
    drawing.row(("data", "A checkpoint that describes itself", "", ["config.json, arctic_plugins.json"]))
    return drawing


def diagrams() -> Iterator[tuple[Path, str]]:
    """Yield the file and the content of each diagram."""
    for draw in (data_flow, training_step, stack):
        yield Path(__file__).parent / f"{draw.__name__.replace('_', '-')}.svg", draw().svg()


if __name__ == "__main__":
    for path, content in diagrams():
        path.write_text(content)
