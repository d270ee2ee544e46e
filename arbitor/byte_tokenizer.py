"""The tokenizer of every model here, as the library transformers meets it: a byte is an id."""

from __future__ import annotations

from typing import Any

from arbitor.reference.config import NUM_BYTES, SPECIAL_IDS
from arbitor.sidecars.libraries import library

_library: Any = library("transformers")

__all__ = ["ByteTokenizer"]


class ByteTokenizer(_library.PreTrainedTokenizer):
    """Text as its bytes in UTF-8: a byte is an id. It needs no file, and any model of ours can be given it.

    Bytes that are no UTF-8 come back as �, as they do from `ArbModel.generate`. Text that looks like a special is bytes too.
    """

    vocab_files_names: dict[str, str] = {}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, **more: Any) -> None:
        specials = {f"{name.lower()}_token": f"<{name.lower()}>" for name in ("PAD", "BOS", "EOS")}
        more.setdefault("padding_side", "left")
        super().__init__(
            **{**specials, "split_special_tokens": True, "clean_up_tokenization_spaces": False, **more}
        )

    @property
    def vocab_size(self) -> int:
        """Ids without the specials."""
        return NUM_BYTES

    def get_vocab(self) -> dict[str, int]:
        """Return the id of each token."""
        return {**{chr(byte): byte for byte in range(NUM_BYTES)}, **_special_tokens()}

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Return 0 for tokens that are there. Raises ValueError for others, which no model has an id for."""
        for token in new_tokens if isinstance(new_tokens, list | tuple) else [new_tokens]:
            if str(token) not in _special_tokens():
                raise ValueError(
                    f"new_tokens has {str(token)!r}, but must have none: ids are bytes and specials, "
                    f"{', '.join(_special_tokens())}"
                )
        return 0

    def _tokenize(self, text: str, **more: Any) -> list[str]:
        return [chr(byte) for byte in text.encode("utf-8", errors="surrogateescape")]

    def _convert_token_to_id(self, token: str) -> int:
        return _special_tokens().get(token, ord(token[:1] or "\0"))

    def _convert_id_to_token(self, index: int) -> str:
        names = {place: token for token, place in _special_tokens().items()}
        return names.get(index, chr(index))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the text of tokens; specials have none."""
        found = bytes(ord(token) for token in tokens if len(token) == 1 and ord(token) < NUM_BYTES)
        return found.decode("utf-8", errors="replace")

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Return the ids as they are: a prompt has no marks."""
        return token_ids_0 + (token_ids_1 or [])

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write nothing: there is no file."""
        return ()


def _special_tokens() -> dict[str, int]:
    """Return the id of each special by the token that names it."""
    return {f"<{name.lower()}>": place for name, place in SPECIAL_IDS.items()}
