"""The three number formats: sign, exponent and mantissa, without infinity and NaN.

- 8 bits, e4m3: OCP's (Micikevicius et al., "FP8 Formats for Deep Learning", 2022), encoded up to its largest value,
  448. The code that is NaN in OCP's format (all ones) is never written. It is read as the number 480, which its bits
  would represent, because DeepSpeedFP writes it.
- 6 bits, e3m2: OCP's (Microscaling Formats specification 1.0, 2023), largest value 28. Four codes fill three bytes.
- 12 bits, e4m7: DeepSpeedFP's (deepspeed/ops/fp_quantizer), largest value 510. Two codes fill three bytes.

Every code of every format is exactly representable in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FORMATS", "Format"]


@dataclass(frozen=True)
class Format:
    """A floating-point format of ``1 + exponent + mantissa`` bits."""

    exponent: int
    mantissa: int
    bias: int
    top: int
    """The largest code that is written, without its sign."""
    unit: int
    """The number of codes that fill whole bytes."""

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def max(self) -> float:
        """The value of :attr:`top`."""
        return self.value(self.top)

    def value(self, code: int) -> float:
        """Return the value of ``code``."""
        exponent, mantissa = (code >> self.mantissa) & ((1 << self.exponent) - 1), code & ((1 << self.mantissa) - 1)
        magnitude = 2.0 ** (max(exponent, 1) - self.bias) * ((exponent > 0) + mantissa / (1 << self.mantissa))
        return -magnitude if code >> (self.bits - 1) else magnitude

    def values(self) -> list[float]:
        """Return the values of all codes."""
        return [self.value(code) for code in range(1 << self.bits)]


FORMATS = {
    8: Format(exponent=4, mantissa=3, bias=7, top=0x7E, unit=1),
    6: Format(exponent=3, mantissa=2, bias=3, top=0x1F, unit=4),
    12: Format(exponent=4, mantissa=7, bias=7, top=0x7FF, unit=2),
}
