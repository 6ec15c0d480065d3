"""The policy's tokenizer: byte-level BPE over the solution writers' language, one token per digit.

`" + "` and `" gives "` become single tokens, so that a line of arithmetic costs little more than its digits.
"""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 768
PAD_TOKEN, EOS_TOKEN = "<pad>", "<eos>"

# a digit | a word with the space before it, and the one after it where a digit follows | other signs, leaving the space
# before a word to the word
PIECES = r"[0-9]| ?[A-Za-z]+(?: (?=[0-9]))?|[^A-Za-z0-9]*[^A-Za-z0-9 ](?= [A-Za-z])|[^A-Za-z0-9]+"


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """BPE trained on `texts`; every byte is in the vocabulary, so any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD_TOKEN, EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
