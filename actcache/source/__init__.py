"""Documents to token blocks: read them from wherever they lie, make sequences of them, keep each token's origin.

In: files, folders, `datasets` names or arrays of token ids, and a tokenizer. Out: `TokenBlocks`, token ids and document
numbers of shape `(Q, T)` in seeded random order. The only room that knows the `datasets` library.

    kinds.py      what a document can be: text, chat, token ids
    columns.py    which column of a record holds it
    read.py       files, folders and datasets, to a stream of documents
    chat.py       chats to text, through the tokenizer's template
    bos.py        the tokens that begin and end documents and sequences
    tokenise.py   documents to token ids, many in one call of the tokenizer
    pack.py       token ids to sequences, in temporary files, in random order
"""

from actcache.source.bos import BosPolicy as BosPolicy
from actcache.source.kinds import Document as Document
from actcache.source.pack import Packing as Packing
from actcache.source.pack import token_blocks as token_blocks
from actcache.source.read import EMBEDDED_CORPUS as EMBEDDED_CORPUS
from actcache.source.read import read_chats as read_chats
from actcache.source.read import read_documents as read_documents
from actcache.source.read import read_texts as read_texts
from actcache.source.read import read_tokens as read_tokens
