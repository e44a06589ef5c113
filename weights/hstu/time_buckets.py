"""Buckets of time differences, as the research repository counts them, without a logarithm at run time.

    bucket(d) = clamp(trunc(ln(max(|d|, 1)) / 0.301), 0, highest)      in single precision

Two single-precision logarithms disagree by one bucket at isolated differences, and a model is trained with one of them and
served with another. So the smallest difference of each bucket is written down: a bucket is the number of thresholds that are
not above |d|. Bucket 1 is empty. The server has the same table; the tests compare the two. """

import torch

DIVISOR = 0.301
THRESHOLDS = [
    int(number)
    for number in """2 2 3 4 5 7 9 12 16 21 28 38 51 68 92 124 167 226 305 412 557 752 1016 1372 1854 2505 3385 4574 6180 8350 11283 15245 20600 27834
    37610 50818 68666 92782 125367 169397 228891 309280 417901 564672 762990 1030959 1393042 1882290 2543367 3436623 4643595 6274467 8478123
    11455710 15479070 20915478 28261151 38186755 51598331 69720053 94206437 127292700 171999177 232406601 314030161 424319920 573345376 774710112
    1046794145 1414438848 1911204161 2582433664 3489410432 4714926848 6370844929 8608349696 11631690241 15716857344 21236737025""".split()
]
# The table ends here: 900 years of seconds. Times in milliseconds belong divided by 1000.
LARGEST_DIFFERENCE = 28_000_000_000
STARTS = torch.tensor(THRESHOLDS)


def time_buckets(differences, highest):
    """Buckets 0 to `highest`, of the shape of `differences` (int64, in the unit of training)."""
    magnitude = differences.abs()
    if magnitude.numel() and int(magnitude.max()) > LARGEST_DIFFERENCE:
        raise ValueError(f"times differ by {int(magnitude.max())}, more than {LARGEST_DIFFERENCE}: are they in seconds?")
    return torch.bucketize(magnitude, STARTS, right=True, out_int32=True).clamp_(max=highest)
