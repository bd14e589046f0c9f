"""The verdicts as JUnit XML, as CI services read it: a suite for each peer, a case for each scenario.

A broken rule is a failure. What was not played, and a finding, is skipped, with its reason.
"""

import re
from xml.etree import ElementTree as ET

from comparisons.conformance.report import PeerResults, Results

# XML 1.0 has no way to write these, and a peer's last words may hold any of them
FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def document(results: Results) -> bytes:
    root = ET.Element("testsuites", _counted("triptych conform", results.peers))
    for peer in results.peers:
        suite = ET.SubElement(root, "testsuite", _counted(f"{peer.name} {peer.version}".strip(), [peer]))
        for verdict in peer.verdicts:
            case = ET.SubElement(
                suite,
                "testcase",
                name=_text(verdict.title),
                classname=_text(f"{peer.name}.rule-{verdict.rule}"),
                time=f"{verdict.seconds:.2f}",
            )
            if verdict.status == "broken":
                ET.SubElement(case, "failure", message=_text(verdict.seen), type="broken")
            elif verdict.status != "kept":
                ET.SubElement(case, "skipped", message=_text(f"{verdict.status}: {verdict.seen}"))
    ET.indent(root)
    text: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def _counted(name: str, peers: list[PeerResults]) -> dict[str, str]:
    verdicts = [verdict for peer in peers for verdict in peer.verdicts]
    broken = sum(verdict.status == "broken" for verdict in verdicts)
    kept = sum(verdict.status == "kept" for verdict in verdicts)
    return {
        "name": _text(name),
        "tests": str(len(verdicts)),
        "failures": str(broken),
        "errors": "0",
        "skipped": str(len(verdicts) - broken - kept),
        "time": f"{sum(verdict.seconds for verdict in verdicts):.2f}",
    }


def _text(text: str) -> str:
    return FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)
