"""
Rows for turning a chat model into one with a long memory: documents with things hidden in them, and questions.

    splits.py       what is trained on and what is kept for choices and for the test
    tables.py       reads words.txt, entities.txt, attributes.txt, wordings.txt: kinds of fact and their wordings
    values.py       numbers, names, dates, codes of a split
    facts.py        facts and questions about them, unanswerable ones among them
    clauses.py      reads events.txt; clauses of an event: active, passive, as a question
    events.py       who does what, when, where, why, questions about each part, and about heads of documents
    documents.py    made-up minutes, contracts, chat logs, mails, logs, tables, records and code, full of facts
    families.py     rows of facts, events and documents
    qa.py           passages with questions, from a file
    stories.py      stories of bAbI
    ruler_forms.py  needles, chains of variables, frequent words
    haystack.py     books and source code as streams of tokens
    chat.py         the chat template
    rows.py         tokens, roles of tokens, places of evidence; shards
    mixture.py      the recipe
    evaluation.py   questions and scores for the test
    prepare.py      the commands
"""
