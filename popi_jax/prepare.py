"""Reads and checks the data of a configuration, writes the prepared copy that training reads, and prints what is in it."""

from popi_jax import cli
from popi_jax.config import Config


def main(config: Config) -> None:
    from popi_jax.data.prepare import Dataset, prepare
    from popi_jax.data.templates import signals_text

    def table(dataset: Dataset) -> str:
        counts = [f"{split:<12}{n['users']:>8}{n['pairs']:>8}" for split, n in dataset.stats.items() if "users" in n]
        return "\n".join([f"{'split':<12}{'users':>8}{'pairs':>8}", *counts])

    dataset = prepare(config.data, allow_sample=True)
    print(f"source: {dataset.name} ({dataset.data} data) from {dataset.folder}\nprepared copy: {dataset.prepared}\n")
    print(table(dataset))
    skipped = dataset.stats["rows"]["skipped"]
    print(f"bad rows skipped: {skipped}" + (f" (listed in {dataset.prepared / 'bad_rows.jsonl'})" if skipped else ""))
    user = dataset.splits["train"][0]
    print(f"\nfirst user of the train split, {user.user_id}\n\n--- signals\n{signals_text(user)}")
    asked = "\n".join(f"{m['role']}: {m['content']}" for m in user.pairs[0].prompt)
    print(f"--- first of {len(user.pairs)} held-out pairs\n{asked}")
    print(f"chosen: {user.pairs[0].chosen}\nrejected: {user.pairs[0].rejected}")
    if user.oracle:
        print(f"--- true persona, never shown to the inference model\n{user.oracle}")


if __name__ == "__main__":
    cli.run(main, description=__doc__)
