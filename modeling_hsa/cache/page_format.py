"""How keys and values of chunks are written down: as they are, or in 8 bits."""

import torch


class ExactFormat:
    """As they are."""

    kv_dtype: str | None = None
    names = ("keys", "values")

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[n, S, Hkv, D] twice -> the tensors [n, ...] to be kept, in the order of `names`."""
        return keys, values

    def decode(self, parts: tuple[torch.Tensor, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Undoes `encode`; `dtype`: of the keys and values that were encoded."""
        return parts


class Int8Format:
    """
    In 8 bits, with a scale for each channel of a head in a chunk: keys have few channels that are large in all tokens.
    Half the bytes of half precision, and 1/S of them more for scales.
    """

    kv_dtype = "int8"
    names = ("keys", "values", "key_scales", "value_scales")

    def encode(self, keys, values):
        (keys, key_scales), (values, value_scales) = _quantize(keys), _quantize(values)
        return keys, values, key_scales, value_scales

    def decode(self, parts, dtype):
        keys, values, key_scales, value_scales = parts
        return (keys * key_scales).to(dtype), (values * value_scales).to(dtype)


def _quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [n, S, Hkv, D] -> int8 of the same shape, and fp32 scales [n, 1, Hkv, D]."""
    x = x.float()
    scales = x.abs().amax(1, keepdim=True).clamp(min=1e-20) / 127
    return (x / scales).round().clamp(-127, 127).to(torch.int8), scales


FORMATS = {fmt.kv_dtype: fmt for fmt in (ExactFormat, Int8Format)}
