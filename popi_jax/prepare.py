"""Reads and checks the data of a configuration, writes the prepared copy for training and prints
what is in it."""

import os

from popi_jax import cli
from popi_jax.config import Config


def main(config: Config) -> None:
    from popi_jax import distributed
    from popi_jax.data.prepared import prepare
    from popi_jax.data.prompts import render_signals
    from popi_jax.data.records import SPLITS

    dataset = prepare(config.data, allow_sample=distributed.is_alone_on_cpu(os.environ))
    print(f"source: {dataset.name} ({dataset.data} data) from {dataset.folder}")
    print(f"licence: {dataset.source.licence}")
    print(f"prepared copy: {dataset.prepared}\n")
    print(f"{'split':<12}{'users':>8}{'pairs':>8}")
    for split in SPLITS:
        print(f"{split:<12}{dataset.stats[split]['users']:>8}{dataset.stats[split]['pairs']:>8}")
    bad_rows = dataset.prepared / "bad_rows.jsonl"
    print(f"bad rows skipped: {dataset.stats['rows']['skipped']} (listed in {bad_rows})")

    user = dataset.splits["train"][0]
    pair = user.pairs[0]
    print(f"\nfirst user of the train split, {user.user_id}\n")
    print(f"--- signals\n{render_signals(user, config.data.pair_layout)}")
    print(f"--- first of {len(user.pairs)} held-out pairs")
    for message in pair.prompt:
        print(f"{message['role']}: {message['content']}")
    print(f"chosen: {pair.chosen}\nrejected: {pair.rejected}")
    print(f"--- true persona, never shown to the inference model\n{user.oracle or '(unknown)'}")


if __name__ == "__main__":
    cli.run(main, description=__doc__)
