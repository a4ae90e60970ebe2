"""The dashboard asks for numbers that there are."""

import json
import re
from pathlib import Path

from tests.http_asker import Asker, run

DASHBOARD = Path(__file__).parents[2] / "k8s" / "grafana" / "ringspan.json"


def test_every_panel_has_its_metrics() -> None:
    asked = re.findall(r"(ringspan:\w+)", json.dumps(json.loads(DASHBOARD.read_text())["panels"]))

    async def test(ask: Asker) -> None:
        await ask.post("/v1/completions", {"prompt": "abcd"})
        page = (await ask.client.get("/metrics")).text
        told = set(re.findall(r"^(ringspan:\w+)", page, re.MULTILINE))
        assert len(asked) > 20
        assert set(asked) <= told

    run(test)
