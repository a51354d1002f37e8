"""The live pages in a real browser: they follow what happens, hold no more than they show, and can be read without a
script."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.deployment import Deployment, deployed
from tests.services import missing, wait_until

pytestmark = [pytest.mark.requirement("M21", "G12"), pytest.mark.filterwarnings("default")]

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(scope="module")
def zerog(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("pages")) as made:
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium")
    if program is None:
        missing("chromium")
    with sync_playwright() as started:
        made = started.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield made
        made.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page on which nothing may be refused by the content security policy, and no script may fail."""
    made = browser.new_page()
    faults: list[str] = []
    made.on("pageerror", lambda error: faults.append(str(error)))
    made.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    yield made
    made.close()
    assert faults == []


@pytest.fixture
def without_script(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(java_script_enabled=False)
    yield context.new_page()
    context.close()


def test_a_job_is_followed_to_its_result(zerog: Deployment, page: Page) -> None:
    uuid = zerog.submit("sleep", {"seconds": 3})
    page.goto(f"{zerog.url}/jobs/{uuid}")
    expect(page.locator("[data-state]")).to_have_text("running", timeout=10_000)
    value = float(page.locator("progress").get_attribute("value") or 0)
    wait_until(lambda: float(page.evaluate("document.querySelector('progress').value")) > value, 5, "the bar moves")
    expect(page.locator("[data-state]")).to_have_text("succeeded", timeout=10_000)
    expect(page.locator("pre").first).to_contain_text("slept")
    expect(page.locator("[data-percent]")).to_have_text("100 %")
    expect(page.get_by_role("button", name="Cancel")).to_have_count(0)


def test_what_a_job_said_stands_on_its_page(zerog: Deployment, page: Page) -> None:
    uuid = zerog.submit("speak", {"count": 3})
    zerog.wait(uuid)
    page.goto(f"{zerog.url}/jobs/{uuid}")
    expect(page.locator("h2", has_text="Events")).to_have_count(1)
    assert page.locator("table").last.locator("tbody tr").count() == 3


def test_a_job_is_cancelled_by_its_button(zerog: Deployment, page: Page) -> None:
    uuid = zerog.submit("sleep", {"seconds": 60})
    zerog.wait_for(uuid, state="running")
    page.goto(f"{zerog.url}/jobs/{uuid}")
    page.get_by_role("button", name="Cancel").click()
    expect(page).to_have_url(f"{zerog.url}/jobs/{uuid}")
    expect(page.locator("[data-state]")).to_have_text("cancelled", timeout=10_000)
    assert zerog.job(uuid)["state"] == "cancelled"


def test_a_queued_job_says_why_it_waits_and_the_queue_is_paused_and_resumed(
    zerog: Deployment, page: Page, browser: Browser
) -> None:
    page.goto(f"{zerog.url}/queue")
    row = page.locator("tr", has=page.get_by_role("link", name="steps", exact=True))
    row.get_by_role("button", name="Pause").click()
    expect(page).to_have_url(f"{zerog.url}/queue")
    expect(row).to_contain_text("by local")
    uuid = zerog.submit("steps", {"path": str(zerog.folder / "steps"), "bad": 100})
    expect(row.locator("td").nth(1)).to_have_text("1", timeout=10_000)
    expect(row.locator("td").nth(4)).to_have_text(re.compile(r"\d+\.\d s"), timeout=10_000)
    other = browser.new_page()
    other.goto(f"{zerog.url}/jobs/{uuid}")
    expect(other.locator(".why")).to_contain_text("paused by local")
    other.close()
    row.get_by_role("button", name="Resume").click()
    expect(row.get_by_role("button", name="Pause")).to_have_count(1)
    zerog.wait(uuid)


def test_the_start_page_shows_what_runs_now(zerog: Deployment, page: Page) -> None:
    page.goto(zerog.url)
    running = page.locator("h2", has_text="What runs now").locator("xpath=following-sibling::*[1]")
    expect(running).to_contain_text("No jobs here", timeout=10_000)
    uuid = zerog.submit("sleep", {"seconds": 4})
    expect(running).to_contain_text(uuid[:8], timeout=10_000)
    expect(running).to_contain_text("No jobs here", timeout=15_000)


def test_pages_can_be_read_and_used_without_a_script(zerog: Deployment, without_script: Page) -> None:
    uuid = zerog.submit("sleep", {"seconds": 60})
    zerog.wait_for(uuid, state="running")
    without_script.goto(f"{zerog.url}/jobs/{uuid}")
    expect(without_script.locator("[data-state]")).to_have_text("running")
    without_script.get_by_role("button", name="Cancel").click()
    zerog.wait_for(uuid, state="cancelled")
    for path in ("/", "/queue", "/jobs", "/types", "/view_status"):
        without_script.goto(zerog.url + path)
        expect(without_script.locator("main")).not_to_be_empty()


def test_a_page_holds_what_it_shows_and_no_more(zerog: Deployment, page: Page) -> None:
    """A job that says a thousand things: the page shows the newest hundred, however long it was open."""
    uuid = zerog.submit("speak", {"count": 1000})
    page.goto(f"{zerog.url}/jobs/{uuid}")
    zerog.wait(uuid)
    expect(page.locator("[data-state]")).to_have_text("succeeded", timeout=10_000)
    page.wait_for_function("document.querySelectorAll('main tbody tr').length > 50")
    assert page.evaluate("document.querySelectorAll('main h2 + table tbody tr').length") <= 100
    assert page.evaluate("document.querySelectorAll('*').length") < 1500


def test_a_page_goes_on_when_its_server_was_away(tmp_path: Path, browser: Browser) -> None:
    with deployed(tmp_path) as zerog:
        uuid = zerog.submit("sleep", {"seconds": 6})
        zerog.wait_for(uuid, state="running")
        page = browser.new_page()
        page.goto(f"{zerog.url}/jobs/{uuid}")
        zerog.restart_server()
        expect(page.locator("[data-state]")).to_have_text("succeeded", timeout=30_000)
        page.close()


def test_what_a_job_says_is_text_and_nothing_else(zerog: Deployment, page: Page) -> None:
    text = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    uuid = zerog.submit("speak", {"text": text})
    zerog.wait(uuid)
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: dialogs.append(dialog.message))
    page.goto(f"{zerog.url}/jobs/{uuid}")
    expect(page.locator("main")).to_contain_text(text)
    time.sleep(0.3)  # in which an alert would have come up
    assert dialogs == [] and page.locator("main img").count() == 0
