"""Reads and checks the data of a configuration, writes the prepared copy for training and prints
what is in it."""

from popi_jax import cli
from popi_jax.config import Config


def main(config: Config) -> None:
    from popi_jax.data.prepared import prepare
    from popi_jax.data.prompts import render_signals
    from popi_jax.data.splits import SPLITS

    dataset = prepare(config.data, allow_sample=True)
    print(
        f"source: {dataset.name} ({dataset.data} data) from {dataset.folder}\nprepared copy: {dataset.prepared}\n"
    )
    print(f"{'split':<12}{'users':>8}{'pairs':>8}")
    for split in SPLITS:
        print(f"{split:<12}{dataset.stats[split]['users']:>8}{dataset.stats[split]['pairs']:>8}")
    print(
        f"bad rows skipped: {dataset.stats['rows']['skipped']} (listed in {dataset.prepared / 'bad_rows.jsonl'})"
    )

    user = dataset.splits["train"][0]
    prompt = "\n".join(
        f"{message['role']}: {message['content']}" for message in user.pairs[0].prompt
    )
    print(
        f"\nfirst user of the train split, {user.user_id}\n\n--- signals\n{render_signals(user, config.data.pair_layout)}"
    )
    print(f"--- first of {len(user.pairs)} held-out pairs\n{prompt}")
    print(f"chosen: {user.pairs[0].chosen}\nrejected: {user.pairs[0].rejected}")
    print(f"--- true persona, never shown to the inference model\n{user.oracle or '(unknown)'}")


if __name__ == "__main__":
    cli.run(main, description=__doc__)
