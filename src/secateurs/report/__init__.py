"""What a person reads.

The HTML page: page (files in, page out), first_screen (verdict, candidates beside dense), charts, cited (numbers with their
source), and page.html, page.css and page.js. Terminal tables: run_tables, machine_tables, tables, on terminal.
"""
