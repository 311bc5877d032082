"""Records what transformers feeds for the conversations of chat_folders.py:

    python tests/data/record_chat_ids.py chat_ids.json

Run it with transformers 4.57 and with 5, which must write the same but for "sanitized", which 5
alone knows; tests/data/recorded_chat_ids.json is that of 5. null: the template refuses."""

import json
import pathlib
import sys
import tempfile
from typing import Any

import chat_folders  # type: ignore[import-not-found]
import transformers  # type: ignore[import-not-found]


def main(out: str) -> None:
    recorded: dict[str, Any] = {}
    for name in chat_folders.KINDS:
        with tempfile.TemporaryDirectory() as folder:
            chat_folders.make_folder(name, pathlib.Path(folder))
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            recorded[name] = record(tokenizer)
    lines = [f'"{name}": {json.dumps(row)}' for name, row in recorded.items()]
    pathlib.Path(out).write_text("{\n" + ",\n".join(lines) + "\n}\n")


def record(tokenizer: Any) -> dict[str, Any]:
    def apply(messages: Any, asks: bool, **options: Any) -> list[int] | None:
        try:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=asks, **options)
        except Exception:
            return None
        return [int(i) for i in (ids if isinstance(ids, list) else ids["input_ids"])]

    talks, new = chat_folders.CONVERSATIONS, transformers.__version__ >= "5"
    asked = {"role": "user", "content": "bees ?"}
    replies = {
        name: apply([asked, {"role": "assistant", "content": text}], False)
        for name, text in chat_folders.REPLIES.items()
    }
    return {
        "conversations": {name: apply(messages, True) for name, messages in talks.items()},
        "replies": replies,
        "without thinking": apply(talks["turns"], True, enable_thinking=False),
        "sanitized": {
            name: apply(talks[name], True, sanitize_control_tokens=True)
            for name in chat_folders.HAVE_CONTROL_WORDS
            if new
        },
    }


if __name__ == "__main__":
    main(sys.argv[1])
