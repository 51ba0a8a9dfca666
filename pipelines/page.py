"""HTML pages that need neither network nor server: what all of them share. Nothing in them asks for another file."""

import base64
from string import Template

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --card: #f6f7f9; --text: #1c2127; --dim: #5f6b7a; --rule: #dde2e8;
  --accent: #2f7fd0; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --card: #1d2126; --text: #e6e9ed; --dim: #97a3b2;
  --rule: #343b44; --accent: #5aa2ec; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1280px; padding: 24px 20px 60px; background: var(--page); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { margin: 0; font-size: 26px; overflow-wrap: anywhere; }
h2 { margin: 36px 0 12px; font-size: 18px; }
small, .dim { color: var(--dim); }
figure { margin: 0; }
"""

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$title</title>
<style>$style</style>
</head>
<body>
$body<script>$script</script>
</body>
</html>
""")


def page(title: str, style: str, body: str, script: str) -> str:
    """The page. title and body are HTML: whoever makes them escapes what comes from elsewhere."""
    return _PAGE.substitute(title=title, style=_STYLE + style, body=body, script=script)


def png_uri(content: bytes) -> str:
    """A PNG's content as the address of an image."""
    return f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"
