"""Methods side by side: what each gains over plain decoding, by workload, batch and temperature, all in one run.

plan.py        what is compared, in which order, for how long
sets.py        workloads: the project's own sets, files, hub data sets, random tokens
contestant.py  who answers: a method of ours, or another engine (bench/peers)
entry.py       a loaded model with its workloads and contestants
run.py         the run itself: warm-up, rounds, failures, budget
store.py       results.jsonl: one line a measurement, resumable
summary.py     medians, confidence intervals, ratios to plain, identity
ceilings.py    what this machine could do: memory bandwidth, arithmetic
findings.py    the same in words
charts.py, report.py   the HTML report
"""
