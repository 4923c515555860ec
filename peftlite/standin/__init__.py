"""How peftlite stands in for `peft`; `import peftlite.as_peft` switches it on, and importing this does not."""
