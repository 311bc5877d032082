"""Users as examples of one pair each, for prompt-aware summaries (`data.prompt_aware`): each is for
one prompt, which the inference model reads behind the signals."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from popi_jax.data.prepared import Dataset
from popi_jax.data.records import Pair, User


@dataclasses.dataclass(frozen=True)
class Examples(Sequence[User]):
    """A user of one pair for each held-out pair of `users`, in their order: of "ann" these are
    "ann#pair1", "ann#pair2", ... (one person, as evals/conditions.py takes it)."""

    users: Sequence[User]
    places: tuple[tuple[int, int], ...]  # number of the user, number of the pair

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        user_number, pair_number = self.places[index]
        user = self.users[user_number]
        return dataclasses.replace(
            user, user_id=f"{user.user_id}#pair{pair_number + 1}", pairs=(user.pairs[pair_number],)
        )


def list_examples(users: Sequence[User], num_pairs: int) -> Examples:
    """At most `num_pairs` examples of each user."""
    counts = (min(len(user.pairs), num_pairs) for user in users)
    return Examples(users, tuple((n, k) for n, count in enumerate(counts) for k in range(count)))


def split_pairs(dataset: Dataset, cfg: Any) -> tuple[Dataset, Any]:
    """The data of a run and its configuration; with `data.prompt_aware` users are examples."""
    d = cfg.data
    if not d.prompt_aware:
        return dataset, cfg
    splits: dict[str, Sequence[User]] = {
        name: list_examples(users, d.num_pairs) for name, users in dataset.splits.items()
    }
    one = dataclasses.replace(cfg, data=dataclasses.replace(d, num_pairs=1))
    return dataset._replace(splits=splits), one


def ask(user: User, prompt: str) -> User:
    """The user as an example of which a prompt alone is known."""
    asked = [{"role": "user", "content": prompt.strip()}]
    return dataclasses.replace(user, pairs=(Pair("", asked, "", ""),))
