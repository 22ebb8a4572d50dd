"""Playground (`gesso play`): a local page that samples runs while their settings change.

`player` turns settings into images and the equivalent command and needs no gradio; `page` shows them in a browser.
"""
