-- A project of the first schema: a gold image, two answers, a skip and a draft of one rater (rater 2).
CREATE TABLE answers (
    id INTEGER PRIMARY KEY, item INTEGER NOT NULL REFERENCES items,
    person INTEGER NOT NULL REFERENCES people, round INTEGER NOT NULL DEFAULT 0,
    is_calibration INTEGER NOT NULL DEFAULT 0,
    state TEXT NOT NULL CHECK (state IN ('draft', 'done', 'skipped', 'broken')),
    answer TEXT NOT NULL, revision INTEGER NOT NULL DEFAULT 0, seconds REAL NOT NULL DEFAULT 0,
    started REAL NOT NULL, changed REAL NOT NULL, expires REAL NOT NULL,
    score REAL, reason TEXT NOT NULL DEFAULT '', excluded TEXT, UNIQUE (item, person, round));
INSERT INTO "answers" VALUES(1,1,2,0,1,'done','{"implausibility_points": [], "misalignment_points": [], "token_labels": [1, 1, 1], "nothing": {"implausibility": true, "misalignment": true, "words": true}, "ratings": {"plausibility": 4, "alignment": 4, "aesthetics": 4, "overall": 4}, "comment": ""}',1,5.0,1000000000.0,1000000000.0,1000003600.0,1.0,'',NULL);
INSERT INTO "answers" VALUES(2,2,2,0,0,'done','{"implausibility_points": [], "misalignment_points": [], "token_labels": [1, 1, 1], "nothing": {"implausibility": true, "misalignment": true, "words": true}, "ratings": {"plausibility": 4, "alignment": 4, "aesthetics": 4, "overall": 4}, "comment": ""}',1,5.0,1000000000.0,1000000000.0,1000003600.0,NULL,'',NULL);
INSERT INTO "answers" VALUES(3,3,2,0,0,'skipped','{"implausibility_points": [], "misalignment_points": [], "token_labels": [1, 1, 1], "nothing": {"implausibility": false, "misalignment": false, "words": false}, "ratings": {"plausibility": null, "alignment": null, "aesthetics": null, "overall": null}, "comment": ""}',1,0.0,1000000000.0,1000000000.0,1000003600.0,NULL,'too dark',NULL);
INSERT INTO "answers" VALUES(4,4,2,0,0,'draft','{"implausibility_points": [], "misalignment_points": [], "token_labels": [1, 1, 1], "nothing": {"implausibility": false, "misalignment": false, "words": false}, "ratings": {"plausibility": null, "alignment": null, "aesthetics": null, "overall": null}, "comment": "half"}',1,2.5,1000000000.0,1000000000.0,1000003600.0,NULL,'',NULL);
CREATE TABLE items (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, prompt TEXT NOT NULL, file TEXT NOT NULL,
    width INTEGER NOT NULL, height INTEGER NOT NULL, gold TEXT, priority INTEGER NOT NULL,
    state TEXT NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'full', 'manager')));
INSERT INTO "items" VALUES(1,'0.png','a red cat','x.png',64,48,'{"implausibility_points": [], "misalignment_points": [], "token_labels": [1, 1, 1], "nothing": {"implausibility": true, "misalignment": true, "words": true}, "ratings": {"plausibility": 3, "alignment": 3, "aesthetics": 3, "overall": 3}, "comment": ""}',0,'open');
INSERT INTO "items" VALUES(2,'1.png','a red cat','x.png',64,48,NULL,0,'open');
INSERT INTO "items" VALUES(3,'2.png','a red cat','x.png',64,48,NULL,0,'open');
INSERT INTO "items" VALUES(4,'3.png','a red cat','x.png',64,48,NULL,0,'open');
CREATE TABLE people (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, secret BLOB UNIQUE, is_manager INTEGER NOT NULL,
    active INTEGER NOT NULL DEFAULT 1, passed INTEGER NOT NULL DEFAULT 0, round INTEGER NOT NULL DEFAULT 0);
INSERT INTO "people" VALUES(1,'manager',X'20021D4F5A1270B4445C6890B54D5B3F4290CBFFBF65E5DEBA765EA1D0ECC356',1,1,0,0);
INSERT INTO "people" VALUES(2,'ann',X'12521CF24D6124EEE70B50370C848BE20A9F11F290BB2007F683F93531DADFEF',0,1,1,0);
CREATE INDEX open_items ON items (priority DESC, number) WHERE state = 'open' AND gold IS NULL;
CREATE INDEX gold_items ON items (number) WHERE gold IS NOT NULL;
CREATE INDEX answers_of_person ON answers (person, state);
PRAGMA application_id = 1380468321;
PRAGMA user_version = 1;
