"""A bar on the terminal while a long prompt is prefilled."""

from collections.abc import Sequence
from types import TracebackType

from tqdm import tqdm

from actors.messages import Progress


class PrefillBar:
    """Tokens done, rate and time left of the prefill under way, on stderr."""

    def __init__(self) -> None:
        """Show nothing yet: a short prompt needs no bar."""
        self._bar: tqdm | None = None

    def show(self, told: Sequence[Progress]) -> None:
        """Move the bar to where the prefills are, all together."""
        begun = [progress for progress in told if progress.left_s is not None]
        if not begun:
            return
        done = sum(progress.done_tokens for progress in begun)
        if self._bar is None:
            self._bar = tqdm(
                desc="prefill",
                unit=" tokens",
                leave=False,
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{postfix}]",
            )
        self._bar.total = max(done, sum(progress.total_tokens for progress in begun))
        rate = sum(progress.tokens_per_s for progress in begun)
        left_s = max(progress.left_s or 0.0 for progress in begun)
        self._bar.set_postfix_str(f"{rate:.0f} tokens/s, {left_s:.0f} s left", refresh=False)
        self._bar.n = done
        self._bar.refresh()

    def __enter__(self) -> "PrefillBar":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
