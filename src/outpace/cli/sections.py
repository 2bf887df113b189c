"""Help in sections: a command with many options lists those of one kind together."""

from __future__ import annotations

import click

#: heading -> names of options; what is named nowhere stands under the last heading
SECTIONS = {
    "Prompt": ("system", "files", "go_on", "history", "raw", "prediction"),
    "Model": ("model", "precision", "threads", "device"),
    "Answer": ("max_tokens", "stop", "json_schema", "regex", "grammar"),
    "Sampling": (
        *("temperature", "top_k", "top_p", "min_p", "seed"),
        *("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias"),
    ),
    "Decoding": ("method", "head", "draft_model", "draft_precision", "verifier", "planner", "max_rows", "kv"),
    "Output": (),
}


class InSections(click.Command):
    """Its options are listed by SECTIONS."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        of_name = {name: heading for heading, names in SECTIONS.items() for name in names}
        *_, last = SECTIONS
        found: dict[str, list[tuple[str, str]]] = {heading: [] for heading in SECTIONS}
        for option in self.get_params(ctx):
            if record := option.get_help_record(ctx):
                found[of_name.get(option.name or "", last)].append(record)
        for heading, records in found.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)
