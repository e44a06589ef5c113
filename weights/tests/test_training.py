"""What trainers share. Run: python3 -m unittest discover -s weights/tests"""

import os
import random
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import training  # noqa: E402


class TrainingTest(unittest.TestCase):
    def test_even(self):
        self.assertEqual(training.even("abcdefgh", 4), ["a", "c", "e", "g"])
        self.assertEqual(training.even("ab", 9), ["a", "b"])

    def test_batches_hold_every_sequence_once_and_no_more_tokens_than_told(self):
        lengths = [random.Random(1).randrange(1, 60) for _ in range(500)]
        made = training.by_length(lengths, 128, random.Random(2))
        self.assertEqual(sorted(number for batch in made for number in batch), list(range(500)))
        self.assertTrue(all(len(batch) * max(lengths[n] for n in batch) <= 128 for batch in made))
        self.assertEqual(made, training.by_length(lengths, 128, random.Random(2)))
        # A sequence that is longer than a batch is one.
        self.assertEqual(training.by_length([300], 128, random.Random(2)), [[0]])

    def test_cosine(self):
        self.assertEqual([round(training.cosine(done, 0.1), 6) for done in (0, 0.5, 1)], [1.0, 0.55, 0.1])


if __name__ == "__main__":
    unittest.main()
