"""A bar on the terminal while a long prompt is prefilled."""

from types import TracebackType

from tqdm import tqdm

from actors.messages import Progress


class PrefillBar:
    """Tokens done, rate and time left of the prefill under way, on stderr."""

    def __init__(self) -> None:
        """Show nothing yet: a short prompt needs no bar."""
        self._bar: tqdm | None = None

    def show(self, progress: Progress | None) -> None:
        """Move the bar to where the prefill is; None means that none is under way."""
        if progress is None:
            return
        if self._bar is None:
            self._bar = tqdm(
                total=progress.total_tokens, desc="prefill", unit=" tokens", leave=False
            )
            # Count from when the prefill began, not from when we first looked.
            self._bar.start_t -= progress.elapsed_s
        self._bar.update(progress.done_tokens - self._bar.n)

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
