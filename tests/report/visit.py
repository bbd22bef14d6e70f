"""A page in a headless browser: what is on it, where, and whether it can be read."""

import shutil

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")

# texts of charts that can be seen, of which labels are names beside points, with their boxes and those of their chart and marks
CHARTS = """() => [...document.querySelectorAll('.chart')].filter(c => getComputedStyle(c).visibility === 'visible').map(chart => {
    const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
    const seen = e => e.textContent.trim() && e.getBoundingClientRect().width > 0 && getComputedStyle(e).opacity !== '0' && e.getAttribute('opacity') !== '0';
    return {
        name: chart.id, label: chart.getAttribute('aria-label'), box: box(chart.querySelector('svg')),
        texts: [...chart.querySelectorAll('svg text')].filter(seen).map(e => [e.textContent, ...box(e)]),
        labels: [...chart.querySelectorAll('.mark-text.role-mark text')].filter(seen).map(e => [e.textContent, ...box(e)]),
        marks: [...chart.querySelectorAll('.mark-symbol.role-mark path')].map(e => [e.getAttribute('d'), ...box(e)]),
        dashed: [...chart.querySelectorAll('[stroke-dasharray]')].filter(e => e.getAttribute('opacity') !== '0').map(box),
        paths: chart.querySelectorAll('svg path').length,
    };
})"""
# elements with text that are cut off, out of sight, or wider than the page
CUT = """() => [...document.querySelectorAll('h1,h2,h3,p,li,pre,caption,summary,td,th,legend,label,.wide,figure')].filter(e => {
    // column heads of small screens stand beside their cells instead
    if (e.closest('thead') && getComputedStyle(e.closest('thead')).position === 'absolute') return false;
    if (e.closest('.off') && getComputedStyle(e.closest('.off')).visibility === 'hidden') return false;
    if (!e.textContent.trim() || e.closest('nav, .switch') && !e.offsetParent) return false;
    const r = e.getBoundingClientRect(), style = getComputedStyle(e);
    return r.width < 1 || r.height < 1 || r.left < -0.5 || r.right > innerWidth + 0.5 || e.scrollWidth > e.clientWidth + 1
        && style.display !== 'inline' || style.visibility === 'hidden';
}).map(e => `${e.tagName}: ${e.textContent.trim().slice(0, 60)}`)"""
# text of every cell that can be seen, without what cannot
CELLS = """() => [...document.querySelectorAll('td, tbody th')].filter(e => e.checkVisibility({visibilityProperty: true}))
    .map(e => e.innerText.trim().replace(/\\s+/g, ' ')).filter(Boolean)"""
NUMBERS = "found => found.map(e => [e.dataset.from, e.dataset.key, e.dataset.form, e.textContent])"


class Visit:
    """What a browser saw of a page. do: called with the tab once all is drawn, its result is `did`. media: 'print' or 'screen'."""

    def __init__(self, file, width=1280, height=900, media="screen", details=False, do=None, **options):
        from playwright.sync_api import sync_playwright

        self.errors, self.requests = [], []
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
            tab = browser.new_page(viewport={"width": width, "height": height}, **options)
            tab.on("console", lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None)
            tab.on("pageerror", lambda error: self.errors.append(str(error)))
            tab.on("request", lambda r: self.requests.append(r.url))
            tab.goto(file.as_uri())
            tab.wait_for_function("document.documentElement.dataset.ready === 'yes'")
            if media == "print":
                # as a browser does before it prints
                tab.evaluate("dispatchEvent(new Event('beforeprint'))")
                tab.emulate_media(media="print")
            if details:
                tab.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
            self.did = do(tab) if do else None
            self.numbers = tab.eval_on_selector_all("[data-from]", NUMBERS)
            self.charts = {chart["name"]: chart for chart in tab.evaluate(CHARTS)}
            self.overflow = tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            self.cut, self.cells = tab.evaluate(CUT), tab.evaluate(CELLS)
            self.ink = tab.evaluate("""() => {
                const text = document.querySelector(".chart svg text");
                return [getComputedStyle(document.body).color, text && getComputedStyle(text).fill];
            }""")
            self.text = tab.inner_text("body")
            tab.keyboard.press("Tab")
            self.first_stop = tab.evaluate("document.activeElement.textContent")
            browser.close()


def overlapping(chart):
    """Pairs of texts of a chart that cover each other by more than a pixel both ways."""
    found = []
    for i, (a, *first) in enumerate(chart["texts"]):
        for b, *second in chart["texts"][i + 1 :]:
            across = min(first[2], second[2]) - max(first[0], second[0])
            down = min(first[3], second[3]) - max(first[1], second[1])
            if across > 1 and down > 1:
                found.append((a, b))
    return found


def outside(chart):
    """Texts of a chart that leave its picture."""
    left, top, right, bottom = chart["box"]
    return [t for t, a, b, c, d in chart["texts"] if a < left - 1 or b < top - 1 or c > right + 1 or d > bottom + 1]
