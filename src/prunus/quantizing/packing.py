"""Codes packed into 32-bit words, as compressed-tensors packs them: unsigned, the first code in the lowest bits.

Letters: O = out_features, I = in_features, W = words in a row.
"""

import torch
from torch import Tensor


def pack(codes_OI: Tensor, bits: int) -> Tensor:
    """int8 codes (O, I) of 4 or 8 bits as int32 words (O, W); the last word is filled up with zero bits."""
    assert bits in (4, 8)
    unsigned_OI = (codes_OI.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    unsigned_OI = torch.nn.functional.pad(unsigned_OI, (0, -codes_OI.shape[1] % (32 // bits)))
    if bits == 4:
        unsigned_OI = unsigned_OI[:, ::2] | (unsigned_OI[:, 1::2] << 4)
    words_OW: Tensor = unsigned_OI.contiguous().view(torch.int32)
    return words_OW


def unpack(words_OW: Tensor, bits: int, width: int) -> Tensor:
    """The inverse: int8 codes (O, I) for I = `width`."""
    assert bits in (4, 8)
    bytes_OB: Tensor = words_OW.contiguous().view(torch.uint8)
    if bits == 4:
        bytes_OB = torch.stack((bytes_OB & 15, bytes_OB >> 4), dim=-1).flatten(1)
    codes_OI: Tensor = bytes_OB[:, :width].to(torch.int16) - 2 ** (bits - 1)
    return codes_OI.to(torch.int8)
